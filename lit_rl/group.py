"""Group: several policies that learn in one Trainer, side by side."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any, TypeVar

import lightning.pytorch as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lit_rl import ranks, resume, sharding
from lit_rl.checks import ConfigurationError, require
from lit_rl.evaluated import Evaluated
from lit_rl.hooks import HOOKS
from lit_rl.inner import InnerLoop, Part, weights
from lit_rl.metrics import Evaluation
from lit_rl.policy import Policy
from lit_rl.stopping import Stopping
from lit_rl.task import Task, Verdict

T = TypeVar("T")


class Group(InnerLoop, Evaluated):
    """Members that are policies, each with its own model and tokenizer. A method defines `prepare`: what they learn from.

    Each has its own random numbers (the first one's are what it would draw alone), AdamW parameter group, learning rate,
    gradient clipping and guard, and logs under its own name. Callbacks with rollout hooks are copied, and each copy sees
    its member as the policy. `export` and `lit-rl export` write a folder for each.

    Args:
        members: The policies. They take their optimizer steps together.
        devices: One for each member, and members then sample at the same time; None: all where the Trainer puts them, one
            after another.
    """

    def __init__(self, members: Sequence[Policy], devices: list[str] | None = None) -> None:
        super().__init__()
        require(len(set(map(id, members))) == len(members) > 0, "members", list(members), "policies that differ")
        limit = f"null, or one for each of {len(members)} members"
        require(devices is None or len(devices) == len(members), "devices", devices, limit)
        for name in ("epochs", "minibatches", "schedule", "warmup_steps", "decay_share"):
            values = {getattr(member, name) for member in members}
            require(len(values) == 1, name, values, "the same for all members, who take their optimizer steps together")
            setattr(self, name, values.pop())
        self.members: Any = nn.ModuleList(members)
        self.devices, self.stopping = devices, Stopping()
        self.strict_loading = all(member.strict_loading for member in members)
        kinds: Counter[str] = Counter()
        for i, member in enumerate(members):
            kind = Path(member.model.config.name_or_path or member.model.config.model_type).name
            kinds[kind] += 1
            member.name, member.stream = kind if kinds[kind] == 1 else f"{kind}-{kinds[kind]}", i
            member.log = partial(self._log, member.name)  # type: ignore[method-assign]
            member.stopping = self.stopping

    @property
    def policies(self) -> Sequence[Any]:
        return list(self.members)

    def _log(self, member: str, name: str, *args: Any, **kwargs: Any) -> None:
        self.log(f"{member}/{name}", *args, **kwargs)

    def log_step(self) -> dict[str, float]:
        """And the mean over members of what are their main numbers."""
        each = [member.log_step() for member in self.members]
        main = {name: mean(one[name] for one in each if name in one) for name in chain(*each)}
        for name, value in main.items():
            self.log(name, value)
        return main

    def each(self, do: Callable[[Any], T]) -> list[T]:
        """do(member) of every member, at the same time when they are on devices of their own. For sampling: scoring forks."""
        if self.devices is None:
            return [do(member) for member in self.members]
        with ThreadPoolExecutor(len(self.members)) as threads:
            return list(threads.map(do, self.members))

    def _accumulate(self, parts: list[Part], optimizer: Any, closure: Callable[[], Any]) -> Any:
        """DDP wants a gradient of every parameter in each synchronised backward, and a slice gives those of one member."""
        with self._no_sync():
            result = super()._accumulate(parts, optimizer, closure)
        for policy, _ in self._by_policy(parts) if self.trainer.world_size > 1 else []:
            for weight in weights(policy, optimizer):
                if weight.grad is not None:
                    weight.grad = self.trainer.strategy.reduce(weight.grad, reduce_op="mean")
        return result

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for member in self.members:
            own: Any = SimpleNamespace(param_groups=[{"params": weights(member, optimizer)}])
            super().configure_gradient_clipping(own, *args, **kwargs)

    # ---------------------------------------------------------------- evaluation

    @property
    def evaluations(self) -> dict[str, Evaluation]:
        return super().evaluations | {member.name: member.evaluation for member in self.members}

    def judge(self, tasks: list[Task]) -> list[list[tuple[Task, list[Verdict], list[int]]]]:
        """Of each member what its `Actor.judge` returns."""
        every = self.each(lambda member: member.answer(tasks))
        return [member.judge(*responses) for member, responses in zip(self.members, every, strict=True)]

    def predict_step(self, batch: list[Task], batch_idx: int) -> list[dict[str, Any]]:
        """One record a response, as each member's, with its name."""
        return [{"member": one.name, **record} for one in self.members for record in one.predict_step(batch, batch_idx)]

    # ---------------------------------------------------------------- the Trainer

    def configure_callbacks(self) -> list[L.Callback]:
        own = super().configure_callbacks()
        for member in self.members:
            member.trainer = self.trainer
        trainer: Any = self.trainer
        trainer.callbacks = [
            ForEach(one, self.members)
            if any(hasattr(one, name) for name in HOOKS) and not isinstance(one, ForEach | Stopping)
            else one
            for one in trainer.callbacks
        ]
        return own

    def setup(self, stage: str) -> None:
        kind, strategy = type(self).__name__, self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            raise ConfigurationError(
                f"{kind} cannot shard its members ({type(strategy).__name__}): set the strategy to ddp"
            )
        for member in self.members:
            sharding.refuse_unsupported(strategy, member.model, member.adapters is not None)
        alone = self.devices is None or self.trainer.world_size == 1
        require(alone, "devices", self.devices, "null with several processes, each of which holds all members on one")
        super().setup(stage)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        super().to(*args, **kwargs)
        for member, device in zip(self.members, self.devices or [], strict=False):
            member.to(device)
        return self

    def on_train_start(self) -> None:
        optimizer = self.trainer.optimizers[0]
        for group in optimizer.param_groups:
            for weight in group["params"]:  # Lightning loads their states to one device
                state = optimizer.state.get(weight, {})
                moved = {
                    k: v for k, v in state.items() if isinstance(v, Tensor) and (k != "step" or group.get("fused"))
                }
                state.update({k: v.to(weight.device) for k, v in moved.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Each member's part is what it would save alone."""
        checkpoint["lit_rl"] = {"members": {}, "ranks": ranks.gather(resume.rank_state(self.trainer, checkpoint))}
        whole, checkpoint["state_dict"] = checkpoint["state_dict"], {}
        for i, member in enumerate(self.members):
            prefix = f"members.{i}."
            part = {"state_dict": {k.removeprefix(prefix): v for k, v in whole.items() if k.startswith(prefix)}}
            member.on_save_checkpoint(part)
            checkpoint["lit_rl"]["members"][member.name] = part["lit_rl"]
            checkpoint["state_dict"] |= {f"{prefix}{k}": v for k, v in part["state_dict"].items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("lit_rl", {}).get("members", {})
        names = [member.name for member in self.members]
        require(list(saved) == names, "the checkpoint's members", list(saved), f"this run's, {names}")
        for member in self.members:
            member.on_load_checkpoint({"lit_rl": saved[member.name]})
        if self._trainer is not None:
            state = resume.of_this_rank(self.trainer, checkpoint["lit_rl"]["ranks"])
            checkpoint.update(resume.rank_state(self.trainer, state))

    def export(self, folder: str | Path, overwrite: bool = False) -> None:
        """Writes each member's Hugging Face folder, as NAME inside `folder`. To be called on all ranks; rank 0 writes."""
        for member in self.members:
            member.export(Path(folder, member.name), overwrite)


class ForEach(L.Callback):
    """A callback of one policy, for several in a module: each has a copy, to which it is the module that trains."""

    def __init__(self, callback: L.Callback, policies: Iterable[L.LightningModule]) -> None:
        self.policies = list(policies)
        self.callbacks = [callback, *(copy.deepcopy(callback) for _ in self.policies[1:])]
        self.needs_all_rows = getattr(callback, "needs_all_rows", False)

    @property
    def state_key(self) -> str:
        return self.callbacks[0].state_key

    def state_dict(self) -> dict[str, Any]:
        return {"each": [callback.state_dict() for callback in self.callbacks]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for callback, state in zip(self.callbacks, state_dict["each"], strict=True):
            callback.load_state_dict(state)


def _forward(hook: str) -> Callable[..., None]:
    def forward(self: ForEach, trainer: L.Trainer, module: L.LightningModule, *args: Any, **kwargs: Any) -> None:
        for policy, callback in zip(self.policies, self.callbacks, strict=True):
            if module in (policy, trainer.lightning_module) and (method := getattr(callback, hook, None)) is not None:
                method(trainer, policy, *args, **kwargs)

    return forward


for _hook in (*HOOKS, "setup", "teardown", *(name for name in vars(L.Callback) if name.startswith("on_"))):
    setattr(ForEach, _hook, _forward(_hook))
