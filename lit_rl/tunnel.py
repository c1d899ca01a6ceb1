"""`lit-rl tunnel`: options are searched on narrow models, and hold for wide ones.

ModelTunnel v2 (MiniCPM4, arXiv 2506.07900, section 4): under muP the best learning rate does not depend on the width, so a
search over small models costs next to nothing. Optuna keeps the trials in one journal, which any number of processes share:
a search that was interrupted goes on, and what its processes had begun is begun again.
"""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import product
from pathlib import Path
from typing import Any

from lit_rl import jsonl
from lit_rl.checks import require

Options = dict[str, Any]
Objective = Callable[[Options, Path], float]
"""(options, folder of its own) -> what shall be low. FloatingPointError: it diverged, and counts as infinite."""
JOURNAL, REPORT, BEST = "journal.log", "tunnel.json", "best.yaml"


@dataclass(frozen=True)
class Range:
    """The numbers from low to high, evenly or by their logarithm."""

    low: float
    high: float
    log: bool = False


Space = dict[str, Range | list[Any]]
"""Of each option a range, or the values to choose from. Without any range, all combinations are tried."""


def dimension(text: str) -> tuple[str, Range | list[Any]]:
    """ "model.lr=1e-4:1e-1:log", "model.weight_decay=0:0.2" or "model.warmup_steps=0,10,100"."""
    name, equals, values = text.partition("=")
    form = "NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=VALUE,VALUE"
    require(bool(name and equals and values), "a search", repr(text), form)
    if ":" not in values:
        return name, [_value(value) for value in values.split(",")]
    low, high, *log = values.split(":")
    try:
        found = Range(float(low), float(high), bool(log))
    except ValueError:
        found = Range(math.nan, math.nan)
    require(log in ([], ["log"]) and found.low < found.high, "a search", repr(text), f"{form}, with LOW below HIGH")
    require(not found.log or found.low > 0, "a search", repr(text), "above 0 where it is by logarithms")
    return name, found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True)
class Fit:
    """The objective: the last `metric` of a `lit-rl fit` with these further arguments."""

    words: tuple[str, ...]
    metric: str = "val/loss"
    maximize: bool = False

    def __call__(self, options: Options, folder: Path) -> float:
        from lit_rl.cli import resolve, run_cli

        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        run_cli(resolve(["fit", *self.words, *words, "--run", str(folder), *quiet]))
        rows = jsonl.read(folder / "metrics.jsonl")
        found = [row[self.metric] for row in rows if self.metric in row]
        if not found:
            names = ", ".join(sorted({name for row in rows for name in row if name.startswith("val/")}))
            known = f"--metric may be {names}" if names else "it has had no validation"
            raise ValueError(f"{folder} has logged no {self.metric}: {known}")
        return -found[-1] if self.maximize else found[-1]


def search(
    objective: Objective, space: Space, folder: str | Path, name: str = "search", trials: int = 20, jobs: int = 1
) -> list[tuple[Options, float]]:
    """All trials of the study `name` in `folder` once there are that many, best first, as (options, value).

    Those that a journal there holds are not repeated. Trials run in folders of their own under `folder`/`name`; with `jobs`
    in as many processes, for which the objective must be picklable. An error of the objective ends the search, which may be
    started again.
    """
    import optuna

    require(trials >= 1, "trials", trials, "at least 1")
    require(jobs >= 1, "jobs", jobs, "at least 1")
    folder = Path(folder)
    (folder / name).mkdir(parents=True, exist_ok=True)
    study = _study(folder, name, space)
    choices = [values for values in space.values() if isinstance(values, list)]
    if len(choices) == len(space):
        combinations = [dict(zip(space, values, strict=True)) for values in product(*choices)]
        trials = len(combinations)
        with _lock(folder / ".lock"):
            for options in combinations:
                study.enqueue_trial(options, skip_if_exists=True)
    context = multiprocessing.get_context("spawn")
    work = (objective, space, folder, name, trials)
    helpers = [context.Process(target=_work, args=work) for _ in range(jobs - 1)]
    for helper in helpers:
        helper.start()
    _work(*work)
    for helper in helpers:
        helper.join()
        if helper.exitcode:
            raise RuntimeError(f"a process of the search ended with code {helper.exitcode}: see its message above")
    done = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    return sorted(((trial.params, float(trial.value)) for trial in done), key=lambda one: one[1])


def _study(folder: Path, name: str, space: Space) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    about = {key: asdict(v) if isinstance(v, Range) else v for key, v in space.items()}
    known = study.user_attrs.setdefault("space", about)
    if known != about:
        raise ValueError(
            f"{folder} holds a search of another space, {known}: choose another folder, or delete this one"
        )
    study.set_user_attr("space", about)
    return study


def _work(objective: Objective, space: Space, folder: Path, name: str, trials: int) -> None:
    """Takes trials, one after another, until there are enough."""
    study = _study(folder, name, space)
    while True:
        with ExitStack() as held:
            with _lock(folder / ".lock"):
                if (trial := _next(study, space, folder / name, trials)) is None:
                    return
                own = folder / name / str(trial.number)
                held.enter_context(_lock(own.with_suffix(".lock")))
            try:
                value = float(objective(dict(trial.params), own))
            except FloatingPointError:
                value = math.inf
            study.tell(trial, value if math.isfinite(value) else math.inf)
        said = [f"{key}={val:.4g}" if isinstance(val, float) else f"{key}={val}" for key, val in trial.params.items()]
        print(f"{name}, trial {trial.number}: {' '.join(said)} -> {value:.5g}", flush=True)


def _next(study: Any, space: Space, folder: Path, trials: int) -> Any:
    """A trial to run, or None when as many are done or at work."""
    import optuna
    from optuna.trial import TrialState

    for old in study.get_trials(states=[TrialState.RUNNING]):
        with _lock(folder / f"{old.number}.lock", wait=False) as lost:
            if lost:  # the process that had it is gone
                study.tell(old.number, state=TrialState.FAIL)
                study.enqueue_trial(old.params)
    if len(study.get_trials(states=[TrialState.COMPLETE, TrialState.RUNNING])) >= trials:
        return None
    # from the trials there are, so that a search that goes on is the one that was not interrupted
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials), constant_liar=True)
    trial = study.ask()
    for key, values in space.items():
        if isinstance(values, Range):
            trial.suggest_float(key, values.low, values.high, log=values.log)
        else:
            trial.suggest_categorical(key, values)
    return trial


@contextmanager
def _lock(file: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process has the file for itself; the system lets go of it when the process ends, however it does."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def tunnel(
    objective: Objective,
    space: Space,
    folder: str | Path,
    narrow: Sequence[str],
    wide: Sequence[str] = (),
    trials: int = 20,
    jobs: int = 1,
    option: str = "model.model",
) -> dict[str, list[tuple[Options, float]]]:
    """Searches for each narrow model, then runs the wide ones with the best options of the last of the narrow. Returns the
    trials by model, best first, and keeps them in `folder`/tunnel.json; the best options are an overlay for `--config` in
    `folder`/best.yaml."""
    require(bool(narrow), "narrow", narrow, "one or more models")
    require(bool(space), "the search", space, "one or more options")
    require(not set(narrow) & set(wide), "wide", list(wide), f"other models than those of narrow, {list(narrow)}")
    folder = Path(folder)
    found = {}
    for model in narrow:
        name = "search-" + "".join(c if c.isalnum() or c in "-." else "-" for c in model)
        found[model] = search(objective, {**space, option: [model]}, folder, name, trials, jobs)
    options, value = found[narrow[-1]][0]
    if math.isinf(value):
        raise ValueError(f"all {len(found[narrow[-1]])} trials of {narrow[-1]} have diverged: search elsewhere")
    best = {key: value for key, value in options.items() if key != option}
    _overlay(best, folder / BEST)
    if wide:
        fixed: Space = {key: [value] for key, value in best.items()}
        space = {**fixed, option: list(wide)}
        digest = blake2b(json.dumps(space).encode(), digest_size=4).hexdigest()  # a search that goes on may find others
        for options, value in search(objective, space, folder, f"transfer-{digest}", jobs=jobs):
            found[options[option]] = [(options, value)]
    (folder / REPORT).write_text(json.dumps({"best": best, "trials": found}, indent=1))
    return found


def _overlay(options: Options, file: Path) -> None:
    import yaml

    content: dict[str, Any] = {}
    for name, value in options.items():
        first, *rest = name.split(".")
        keys = [first, "init_args", *rest] if first in ("model", "data") else [first, *rest]
        at = content
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        at[keys[-1]] = value
    file.write_text("# An overlay: the best options of a search.\n" + yaml.safe_dump(content))
