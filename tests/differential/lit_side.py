"""lit-rl's side: a generator replays the responses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from both_sides import GROUP, MAX_TOKENS, TEMPERATURE, Row, Step, Walk, flat_gradient
from torch import nn

from lit_rl import RLCallback, Sampling, Task
from lit_rl.datamodules.base import TaskData
from lit_rl.generation.base import Completion
from lit_rl.rollout import Rollout
from lit_rl.scoring import Scorer


class Replay:
    """A generator that says what the rows say."""

    exact = False

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def sync(self, model: nn.Module) -> None: ...

    def generate(self, prompts: Any, seeds: Any, sampling: Sampling) -> list[list[Completion]]:
        return [
            [
                Completion(
                    torch.tensor(row.ids),
                    row.sampler_logps,
                    torch.zeros(len(row.ids)),
                    row.text,
                    "stop" if row.finished else "length",
                )
                for row in self.rows
                if row.prompt_ids == prompt
            ]
            for prompt in prompts
        ]

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None: ...


class Walker(Rollout):
    length = 0.1

    def configure_optimizers(self) -> Any:
        return Walk(self.model.parameters(), self.length)


class Given(TaskData):
    def __init__(self, rows: list[Row]) -> None:
        super().__init__(batch_size=len(rows) // GROUP)
        self.rows = rows

    def tasks(self, split: str) -> list[Task]:
        rewards = {row.text: row.reward for row in self.rows}
        return [Task(prompt, rewards.__getitem__) for prompt in dict.fromkeys(row.prompt for row in self.rows)]


class Record(RLCallback):
    """Last in the list, so that it sees what the other callbacks made of the loss."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.loss = self.size = 0.0
        self.clipped: list[float] = []
        """Of each token in each slice: its advantage's sign where the ratio is cut, else 0."""

    def on_loss(self, trainer: Any, policy: Any, x: Any, terms: Any) -> None:
        self.loss += float(terms.total().detach())
        self.size += float((terms.loss * terms.weights)[x.mask].detach().abs().sum())
        self.clipped += (terms.clipped * x.advantages.sign())[x.mask].tolist()

    def on_before_optimizer_step(self, trainer: Any, policy: Any, optimizer: Any) -> None:
        self.steps.append(Step(self.loss, flat_gradient(policy.model), self.size))
        self.loss = self.size = 0.0


def lit(
    folder: Path, rows: list[Row], *, length: float = 0.1, callbacks: Sequence[RLCallback] = (), **settings: Any
) -> Record:
    """The optimizer steps that lit-rl takes."""
    policy = Walker(
        str(folder),
        group=GROUP,
        sampling=Sampling(MAX_TOKENS, TEMPERATURE),
        generator=Replay(rows),
        scoring=Scorer("inline"),
        **settings,
    )
    policy.length = length
    record = Record()
    L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[*callbacks, record],
    ).fit(policy, Given(rows))
    return record
