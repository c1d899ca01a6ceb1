"""Completions: every sampled response, on disk, in W&B, and a few in the terminal."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn

from lit_rl import jsonl, run
from lit_rl.actor import Actor
from lit_rl.experience import Experience
from lit_rl.hooks import RLCallback
from lit_rl.rollout import Rollout
from lit_rl.task import Verdict
from lit_rl.tolerance import tolerate

COLUMNS = [
    "step",
    "family",
    "task",
    "prompt",
    "response",
    "correct",
    "answer",
    "reason",
    "reward",
    "advantage",
    "mean_logp",
    "tokens",
    "off_policy",
    "member",
]


class Completions(RLCallback):
    """Appends a JSON line a response to completions.jsonl in the run's folder (completions.rank1.jsonl and so on for
    further ranks), adds rows to a growing W&B table where a WandbLogger is, and prints samples.

    Responses are what the hook `on_advantage` brings; a module that does not call it is warned of.

    Args:
        every: Responses of one in so many steps are written to the file.
        table_rows: Responses a step added to the W&B table "completions"; 0 for none. They are sent each time that the
            run is a tenth longer, at each checkpoint and at the end, since W&B shows a table's last hundred additions.
        print_every: Steps between printed samples; 0 for none.
        print_rows: How many samples.
    """

    def __init__(self, every: int = 1, table_rows: int = 8, print_every: int = 0, print_rows: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every is {every}: it must be at least 1")
        self.every, self.table_rows, self.print_every, self.print_rows = every, table_rows, print_every, print_rows
        self._path: Path | None = None
        self._table: Any = None
        self._waiting: list[dict[str, Any]] = []
        self._sent = 0
        self._asked = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if getattr(trainer, "fast_dev_run", False):
            return  # a trial leaves nothing behind
        self._path = run.folder(trainer) / run.by_rank(run.COMPLETIONS, trainer.global_rank)
        if trainer.global_step:
            jsonl.rewind(self._path, trainer.global_step)
        else:
            run.refuse_other_run(self._path)

    def on_advantage(self, trainer: L.Trainer, policy: L.LightningModule, experience: Experience) -> None:
        self._asked = True
        step = trainer.global_step
        write, show = step % self.every == 0, self.print_every and step % self.print_every == 0
        table = self.table_rows and run.wandb_logger(trainer)
        if not (write or show or table):
            return
        records = self.records(experience, step, getattr(policy, "name", ""))
        if write and self._path is not None:
            written = tolerate(self._path, partial(jsonl.append, self._path, records))
            if not written and isinstance(policy, Actor):
                policy.count("skipped/completions_unwritten", len(records))
        if trainer.is_global_zero:
            if show:
                self._print(trainer, records)
            if table:
                self._waiting += records[: self.table_rows]
                if step >= 1.1 * self._sent:
                    self._send(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._asked and not isinstance(pl_module, Rollout):  # whose first step may have no rows
            self._asked = True
            rank_zero_warn(
                f"Completions has nothing to record: in its first step {type(pl_module).__name__} has not called the hook"
                " on_advantage. SFT samples no responses; a module of your own calls"
                ' lit_rl.hooks.call(self.trainer, "on_advantage", experience)'
            )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._send(trainer)  # a run that resumes here starts with an empty list

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._send(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._send(trainer)

    @staticmethod
    def records(x: Experience, step: int, member: str = "") -> list[dict[str, Any]]:
        """One record a row, plain values."""
        assert x.advantages is not None
        tokens = x.mask.sum(1).clamp(min=1)
        advantages = (x.advantages.sum(1) / tokens).tolist()
        logps = x.sampler_logps if x.sampler_logps is not None else x.logps
        mean_logps = (logps.sum(1) / tokens).tolist() if logps is not None else [None] * len(x)
        result = []
        verdicts = x.verdicts or [Verdict.invalid("not judged")] * len(x)
        for i, (g, text, verdict) in enumerate(zip(x.group.tolist(), x.texts, verdicts, strict=True)):
            task, given = x.tasks[g], bool(x.off_policy[i])
            values = [
                step,
                task.family,
                task.id,
                task.text(),
                text,
                verdict.correct if verdict.valid else None,
                verdict.answer,
                verdict.reason,
                float(x.rewards[i]),
                advantages[i],
                None if given else mean_logps[i],
                int(x.response_lengths[i]),
                given,
                member,
            ]
            result.append(dict(zip(COLUMNS, values, strict=True)))
        return result

    def _print(self, trainer: L.Trainer, records: list[dict[str, Any]]) -> None:
        out = getattr(trainer.progress_bar_callback, "print", print)
        for r in records[: self.print_rows]:
            mark = {True: "right", False: "wrong", None: "not judged"}[r["correct"]]
            about = ", ".join(filter(None, [f"step {r['step']}", r["family"], mark, f"reward {r['reward']:.2f}"]))
            out(f"--- {about}\n{r['prompt']}\n>>> {r['response']}")

    def _send(self, trainer: L.Trainer) -> None:
        """Adds the waiting rows to W&B's table."""
        if not self._waiting:
            return
        import wandb

        if self._table is None:
            self._table = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        for record in self._waiting:
            self._table.add_data(*record.values())
        self._sent, member = self._waiting[-1]["step"], self._waiting[-1]["member"]
        self._waiting = []
        name = f"{member}/completions" if member else "completions"
        run.wandb_logger(trainer).log_metrics({name: self._table}, step=self._sent)
