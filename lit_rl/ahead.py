"""One-step-off rollouts: the next step's responses are sampled while this one trains."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from lit_rl import sparse_attention, ternary
from lit_rl.forward import Forward
from lit_rl.generation.base import Completion


class Ahead:
    """Samples on a thread, by a copy of the weights, while the policy learns.

    model: A copy of the policy's model, made before anything is hooked to that.
    device: Where it samples; None is where the policy is.
    """

    def __init__(self, model: nn.Module, device: str | None = None) -> None:
        # Its weights require a gradient, as the policy's do: autocast keeps its casts of such alone from pass to pass.
        self.model, self.device, self.version = model, device, -1
        """The step whose weights the copy has."""
        self.forward = Forward(model)
        self.policy: Any = None
        self._thread = ThreadPoolExecutor(1)
        self._future: Future[list[list[Completion]]] | None = None

    @torch.no_grad()
    def start(self, policy: Any, sampling: Any, prompts: Any, seeds: Any, begun: Any) -> None:
        """Takes a copy of the present weights, and begins to sample; the arguments are those of `Actor.generate`."""
        self.policy, self.version = policy, policy.trainer.global_step
        self.model.to(self.device or policy.device)
        ternary.convert(self.model, ternary.groups(policy.model))  # callbacks may have changed how the policy computes
        sparse_attention.follow(self.model, policy.model)
        for mine, present in zip(self.model.parameters(), policy.model.parameters(), strict=True):
            mine.copy_(present)

        def sample() -> list[list[Completion]]:
            with policy.precision():
                policy.generator.sync(self.model)
                result: list[list[Completion]] = policy.generator.generate(prompts, seeds, sampling, begun)
                return result

        self._future = self._thread.submit(sample)

    def wait(self) -> None:
        """Until the engine is free."""
        if self._future is not None:
            self._future.exception()

    def drop(self) -> None:
        self.wait()
        self._future = None

    def join(self) -> list[list[Completion]] | None:
        """What was sampled since `start`; None when there is nothing, or somebody has it."""
        future, self._future = self._future, None
        return None if future is None else future.result()
