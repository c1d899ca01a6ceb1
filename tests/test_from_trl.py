"""What docs/from_trl.md says to those who come from TRL."""

import json
import re
import shlex
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from test_cli import run

from lit_rl import GRPO, Sampling, cli
from lit_rl.commands import recipe_paths
from lit_rl.datamodules import Prompts
from lit_rl.trl_names import OURS

PAGE = (Path(__file__).parent.parent / "docs" / "from_trl.md").read_text()
OF_THE_COMMAND = ["--run", "--ckpt_path", "--seed_everything", "--optimizer"]


def parameters(kind):
    return {name for base in kind.__mro__ for name in signature(base).parameters}


def test_the_table_is_what_the_command_line_says():
    assert dict(re.findall(r"^\| `(\w+)` \| `(--[^`]+)` \|", PAGE, re.MULTILINE)) == OURS


def test_the_names_are_trls():
    trl = pytest.importorskip("trl")
    known = {field.name for field in fields(trl.GRPOConfig)} | signature(trl.GRPOTrainer).parameters.keys()
    assert OURS.keys() <= known


@pytest.mark.parametrize("option", sorted(set(OURS.values())))
def test_the_options_are_ours(option):
    head, _, name = option.rpartition(".")
    if head in ("--model", "--data", "--trainer", "--model.sampling"):
        kind = {"--model": GRPO, "--data": Prompts, "--trainer": Trainer, "--model.sampling": Sampling}[head]
        callback = re.fullmatch(r"callbacks\+=(\w+)", name)
        assert callback[1] in cli.CALLBACKS if callback else name in parameters(kind)
    elif option.startswith("--config "):
        assert option.removeprefix("--config ") in recipe_paths()
    else:
        assert option in OF_THE_COMMAND


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--model.num_generations 4", "TRL's num_generations is --model.group here."),
        ("--learning_rate 1e-5", "TRL's learning_rate is --model.lr here."),
        ("--model.sampling.max_completion_length 9", "max_completion_length is --model.sampling.max_new_tokens here."),
        ("--model.temperature 0.5", "TRL's temperature is --model.sampling.temperature here."),
    ],
)
def test_trls_names_are_answered_with_ours(words, hint, capsys):
    code, text = run(capsys, "fit", "--config", "grpo", "--config", "tiny", *words.split())
    assert code
    assert hint in text


def test_the_command_and_the_script_train(monkeypatch, capsys):
    """The page's own command line, script and reward function, on a model that is here."""
    function, script = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (command,) = re.findall(r"```bash\nlit-rl (.*?)```", PAGE, re.DOTALL)
    Path("mine.py").write_text(function)
    monkeypatch.syspath_prepend(".")
    Path("train.jsonl").write_text(json.dumps({"prompt": "Say a", "answer": "a"}) + "\n")
    tasks = Prompts("train.jsonl", rewards=["mine.reward"]).tasks("train")
    assert [tasks[0].score(text).score for text in (" a\n", "b")] == [1.0, 0.0]
    words = shlex.split(command.replace("\\\n", " "))
    small = "--model.model tiny --data.batch_size 1 --trainer.logger false --trainer.precision 32-true"
    small += " --model.sampling.max_new_tokens 4 --trainer.max_steps 1 --trainer.enable_progress_bar false"
    code, text = run(capsys, *words, *small.split())
    assert code == 0, text
    for large, less in (
        ("Qwen/Qwen2.5-0.5B-Instruct", "tiny"),
        ("=512", "=4"),
        ("=100", "=1"),
        ("bf16-mixed", "32-true"),
    ):
        assert large in script
        script = script.replace(large, less)
    script = script.replace("batch_size=8", "batch_size=1").replace("L.Trainer(", "L.Trainer(logger=False, ")
    exec(compile(script, "from_trl.md", "exec"), {})
    assert Path("my-model/config.json").is_file()
