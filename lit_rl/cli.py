"""The command line: LightningCLI with short names, recipes and run folders. The only file that imports everything."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from difflib import get_close_matches
from inspect import getdoc, signature
from pathlib import Path
from pydoc import locate
from textwrap import dedent
from typing import Any, NoReturn

import jsonargparse
import lightning.pytorch as L
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

import lit_rl.callbacks
import lit_rl.datamodules
from lit_rl import hooks, methods, ranks, resume, run, trl_names
from lit_rl.adapters import LoRA
from lit_rl.commands import COMMANDS, recipe_paths
from lit_rl.generation.base import Sampling
from lit_rl.run import RunLogger

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
# What Lightning says in every run, and no user can act on:
warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated")
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())

METHODS = {name: getattr(lit_rl, name) for name in methods.__all__}
DATAMODULES = {name: getattr(lit_rl.datamodules, name) for name in lit_rl.datamodules.__all__}
ENGINES = {name: getattr(lit_rl, name) for name in ("VLLM", "VLLMServer")}
CALLBACKS = {name: getattr(lit_rl.callbacks, name) for name in lit_rl.callbacks.__all__}
RESTARTS = "SLURM_RESTART_COUNT"
"""How often SLURM has put this job back into its queue and started it again: the run then goes on."""
RUN_VARIABLE = "LIT_RL_RUN"
"""Tells the processes that a launcher starts with the same command line which folder rank 0 has chosen."""


def find_recipe(name: str) -> Path:
    """The file of a `--config`: a path that exists, or the bare name of a recipe."""
    known = recipe_paths()
    if Path(name).is_file():
        return Path(name)
    if name in known:
        return known[name]
    close = get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the recipes are {', '.join(known)}."
    raise ValueError(f"there is no file and no recipe {name!r}: {hint}")


def explain(message: str) -> str:
    """A parser's message without its noise, and with the names of ours that are close to those it complains of."""
    noise = (
        "Given value",
        "- Expected a <class 'NoneType'>",
        "Subtypes:",
        "- Does not validate",
        "Does not validate",
        "Errors:",
        "Subclass types expect one of",
        "- a class path",
        "- a dict with",
    )
    lines = [line for line in message.split("\n") if line.strip() and not line.strip().startswith(noise)]
    message = dedent("\n".join(dict.fromkeys(lines))).removeprefix("- ") or message
    if re.search(r"arguments are required: .*model|'lightning.LightningModule'", message):
        return f"{message}\nNo method is chosen: begin with a recipe, such as --config grpo; lit-rl recipes lists them."
    if "Expected a <class 'str'>. Got value: {" in message:
        message += (
            "\nA text with a colon is read as YAML here: give it in a file of options, by a further --config mine.yaml."
        )
    classes = {**METHODS, **ENGINES, **DATAMODULES, **CALLBACKS}
    options = {p for c in (*classes.values(), Sampling, LoRA) for base in c.__mro__ for p in signature(base).parameters}
    asked = re.findall(r"(?:path string: |Option '|arguments?: -*|option '?)([\w.+-]+)", message)
    for word in dict.fromkeys(w.rpartition(".")[2] for w in asked):
        if word in trl_names.OURS:
            message += f"\nTRL's {word} is {trl_names.OURS[word]} here."
        elif word not in options and (close := get_close_matches(word, [*classes, *options], n=2, cutoff=0.7)):
            message += f"\nDid you mean {' or '.join(close)} instead of {word}?"
    return message


class Formatter(jsonargparse.DefaultHelpFormatter):
    """Leaves out lists of subclasses that nobody reads: a module may be any of PyTorch's."""

    def _get_help_string(self, action: Any) -> str:
        return re.sub(r", known subclasses: ([^,)]+, ){100}[^)]*", "", super()._get_help_string(action))


class Parser(LightningArgumentParser):
    """Complains in a few lines, with suggestions, where jsonargparse prints the usage of every option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Formatter, **kwargs})

    def add_class_arguments(self, class_type: Any, nested_key: Any = None, *args: Any, **kwargs: Any) -> list[str]:
        """Titles a class's options with the first paragraph of its docstring; jsonargparse, with the first line."""
        added = super().add_class_arguments(class_type, nested_key, *args, **kwargs)
        group, about = (self.groups or {}).get(nested_key), (getdoc(class_type) or "").partition("\n\n")[0]
        if group is not None and about.startswith(group.title or "\0"):
            group.title = about.rstrip(".:")
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        sys.exit(
            f"lit-rl: {explain(message)}\nAll options: lit-rl fit --help; those of a class: lit-rl fit --model.help GRPO"
        )


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder, and keeps a run from mixing with another."""

    written: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = run.folder(trainer)
        if stage == "fit" and isinstance(trainer.logger, RunLogger) and self.config.get("ckpt_path") is None:
            run.refuse_other_run(folder / "config.yaml", trainer)
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            folder.mkdir(parents=True, exist_ok=True)
            name = "config.yaml" if stage == "fit" else f"config_{getattr(stage, 'value', stage)}.yaml"
            self.parser.save(self.config, folder / name, skip_none=False, overwrite=True, multifile=False)
            self.written = folder / name
            if logger := run.wandb_logger(trainer):
                content = json.loads(self.parser.dump(self.config, format="json", skip_none=False))
                logger.log_hyperparams({Path(name).stem: content})
                if stage == "fit":
                    (folder / run.WANDB_ID).write_text(logger.version)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run.rewind(trainer)  # a policy does so itself

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A run that never began leaves its folder free for the one that is begun rightly."""
        if self.written and [*self.written.parent.iterdir()] == [self.written]:  # to ask for the folder takes all ranks
            self.written.unlink()


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run",
            type=str,
            default=None,
            help="The run's folder, runs/METHOD-N when it is not given: metrics, completions, checkpoints.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        named = self.config[self.config.subcommand].get("ckpt_path")
        if named and named not in ("last", "best", "hpc") and "://" not in named and not resume.whole(Path(named)):
            what = "is damaged: cut short, or not a checkpoint" if Path(named).exists() else "does not exist"
            sys.exit(f"lit-rl: the checkpoint {named} {what}. --ckpt_path last finds a run's newest whole one.")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.folder: Path | None = None
        if self.subcommand == "fit" and config.get("ckpt_path") is None and int(os.environ.get(RESTARTS, "0")):
            config.ckpt_path = "last"
        if self.subcommand == "fit":
            given = config.trainer.callbacks or []
            kinds = [locate(one.class_path) for one in (given if isinstance(given, list) else [given])]
            classes = [kind for kind in kinds if isinstance(kind, type)]
            settings = vars(config.model.get("init_args") or jsonargparse.Namespace())
            hooks.refuse(locate(config.model.class_path), classes, settings)  # before a large model is loaded
        if not (config.trainer.fast_dev_run or config.trainer.barebones or config.trainer.logger is False):
            if config.run is None and config.trainer.num_nodes > 1:
                sys.exit(
                    "lit-rl: on several machines the run's folder must have a name: give all of them the same --run"
                )
            name = config.model.class_path.rpartition(".")[2].lower()
            os.environ[RUN_VARIABLE] = config.run = os.environ.get(RUN_VARIABLE) or config.run or _free_folder(name)
            self.folder = Path(config.run)
            run.refuse_unwritable(self.folder)
            rank_zero_info(f"The run's folder: {self.folder}")
        config.trainer.default_root_dir = config.trainer.default_root_dir or config.run

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The run's own logger stands before those that are asked for."""
        if self.folder:
            asked = self.config_init[self.subcommand].trainer.logger
            others = [x for x in (asked if isinstance(asked, list) else [asked]) if isinstance(x, Logger)]
            for logger in others:
                if isinstance(logger, WandbLogger):
                    run.name_in_wandb(logger, self.folder, str(self.subcommand))
                    run.connect(logger)
            kwargs["logger"] = [RunLogger(str(self.folder)), *others]
        return super().instantiate_trainer(**kwargs)

    @staticmethod
    def configure_optimizers(lightning_module: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        """As a policy's own: `--optimizer` gets no frozen parameters, and `--lr_scheduler` counts steps, since a run is
        often shorter than an epoch."""
        if any(getattr(policy, "mup", None) for policy in getattr(lightning_module, "policies", [])):
            sys.exit(
                "lit-rl: --optimizer does not work with model.mup, which gives AdamW a rate for each parameter: leave one out"
            )
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        result = LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)
        if not isinstance(result, tuple):
            return result
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": lr_scheduler, "interval": "step"}}

    def before_fit(self) -> None:
        """`--ckpt_path last` is the newest whole checkpoint; without any, the run begins again from its start."""
        config = self.config_init[self.subcommand]
        if config.get("ckpt_path") != "last":
            return
        home, callbacks = run.folder(self.trainer), self.trainer.checkpoint_callbacks
        folders = {Path(getattr(callback, "dirpath", None) or home / "checkpoints") for callback in callbacks}
        try:
            found = resume.newest(folders)
        except ValueError as error:
            sys.exit(f"lit-rl: {error}")
        if found:
            config["ckpt_path"] = str(found)
        elif self.subcommand == "fit" and isinstance(self.trainer.logger, RunLogger):
            run.begin_again(self.trainer)

    before_validate = before_test = before_predict = before_fit

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # a setting that its class refuses
            sys.exit(f"lit-rl: {explain(str(error))}")

    def _run_subcommand(self, subcommand: str) -> None:
        super()._run_subcommand(subcommand)
        ranks.join(self.trainer)
        if self.folder and self.trainer.is_global_zero:
            print(f"{self.folder} holds {', '.join(sorted(path.name for path in self.folder.iterdir()))}")


def _free_folder(name: str) -> str:
    taken = {int(m[1]) for p in Path("runs").glob(f"{name}-*") if (m := re.fullmatch(rf"{name}-(\d+)", p.name))}
    return f"runs/{name}-{max(taken, default=0) + 1}"


def resolve(argv: list[str]) -> list[str]:
    """The command line with recipes' names as paths; raises ValueError for unknown ones and for unknown commands."""
    argv = list(argv)
    for i, word in enumerate(argv):
        if word in ("--config", "-c") and i + 1 < len(argv):
            argv[i + 1] = str(find_recipe(argv[i + 1]))
        elif word.startswith("--config="):
            argv[i] = f"--config={find_recipe(word.removeprefix('--config='))}"
    verbs = ["fit", "validate", "test", "predict"]
    if argv and not argv[0].startswith("-") and argv[0] not in verbs:
        close = get_close_matches(argv[0], [*COMMANDS, *verbs])
        hint = f": did you mean {' or '.join(close)}?" if close else "; see lit-rl --help"
        raise ValueError(f"there is no command {argv[0]!r}{hint}")
    return argv


def run_cli(argv: list[str]) -> CLI:
    """Parses and runs a resolved command line."""
    sys.argv[1:] = argv  # launchers of further processes repeat it
    before = {name: os.environ.get(name) for name in (RUN_VARIABLE, ranks.LAUNCHER_VARIABLE)}
    ranks.end_with_launcher()
    try:
        return CLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            parser_kwargs={"prog": "lit-rl"},
        )
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
