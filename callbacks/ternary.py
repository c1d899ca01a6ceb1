"""TernaryQAT: training with weights of -1, 0 and 1."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_rl import ops, ternary
from lit_rl.checks import ConfigurationError, require


class TernaryQAT(L.Callback):
    """Quantisation-aware training of BitCPM4 (MiniCPM4, arXiv 2506.07900, section 3.3.1), on any LightningModule: from a step
    on, its linear layers compute with ternary weights, each -1, 0 or 1 times the mean magnitude of its group, and train the
    weights under them by the straight-through gradient. Activations, embeddings, norms and heads stay as they are, and so do
    layers that do not train and those of other classes than torch.nn.Linear.

    The high-precision part of the training is what made the model, or the steps before `start_step`; it takes at most 60 % of
    all tokens in the report. At the start the learning rate rises again from zero, to `lr_factor` times what the schedule
    says. That is on top of what schedulers and LearningRateMonitor know, and logged as ternary/lr_factor.

    Parameters and checkpoints have the names that they have without it. A policy samples and evaluates with the same ternary
    weights that it trains, so on-policy the ratio is one; its reference policy stays as the model was at first. The model
    stays ternary after the run. `export` and `lit-rl export` write the rounded weights, and with `packed` their codes;
    training goes on from the former as from the checkpoint, but for the optimizer and what the rounding has dropped.

    Logs, of each Trainer step: ternary/zeros (share of weights that are zero), ternary/flips (share whose code differs from
    the step before), ternary/scale_drift (mean over layers of how far the mean scale has moved since the start, relative).

    Args:
        modules: Names of the linear layers, such as q_proj; None is all but heads.
        group_size: Weights along a row that share a scale; -1 is a row. 32 was the best of those studied.
        start_step: The Trainer step before which nothing is rounded.
        rewarm_steps: Steps from the start on in which the learning rate rises. The report gives no number.
        lr_factor: 0.5 is the report's, from 1e-2 to 5e-3.
    """

    trains_ternary = True
    refuses: ClassVar[dict[str, str]] = {
        "ReferenceRefresh": "it would copy the weights under the rounding into a reference that does not round",
        "lora": "the weights that it trains are frozen under adapters. Leave one out, or export the adapters first (which merges"
        " them) and give the folder as model",
    }

    def __init__(
        self,
        modules: list[str] | None = None,
        group_size: int = 32,
        start_step: int = 0,
        rewarm_steps: int = 100,
        lr_factor: float = 0.5,
    ) -> None:
        require(modules != [], "TernaryQAT.modules", [], "None (all linear layers) or name at least one")
        require(group_size >= 1 or group_size == -1, "TernaryQAT.group_size", group_size, "at least 1, or -1 for a row")
        require(start_step >= 0, "TernaryQAT.start_step", start_step, "at least 0")
        require(rewarm_steps >= 0, "TernaryQAT.rewarm_steps", rewarm_steps, "at least 0")
        require(lr_factor > 0, "TernaryQAT.lr_factor", lr_factor, "above 0")
        self.modules, self.group_size, self.start_step = modules, group_size, start_step
        self.rewarm_steps, self.lr_factor = rewarm_steps, lr_factor
        self._chosen: dict[str, int] = {}
        self._scales: dict[str, float] = {}
        """The mean scale of each layer at the start; empty before it."""
        self._codes: dict[str, Tensor] = {}
        """Packed, as of the last step."""
        self._rates: list[tuple[dict[str, Any], Any]] = []
        """Parameter groups within their step, and their learning rates outside of it."""
        self._hooks: list[Any] = []
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return  # evaluated is what the model, or its checkpoint, is
        self._chosen, self._scales, self._codes = ternary.choose(pl_module, self.modules, self.group_size), {}, {}
        if self.start_step == 0:
            ternary.convert(pl_module, self._chosen)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def before(optimizer: Any, *_: Any) -> None:
            factor = self.factor(trainer.global_step)
            self._rates = [(group, group["lr"]) for group in optimizer.param_groups]
            for group, rate in self._rates:
                group["lr"] = rate * factor

        self._step = trainer.global_step
        for optimizer in trainer.optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(before))
            self._hooks.append(optimizer.register_step_post_hook(lambda *_: self._restore()))

    def factor(self, step: int) -> float:
        """Of the learning rate in this Trainer step."""
        since = step - self.start_step
        return 1.0 if since < 0 else self.lr_factor * min(1.0, (since + 1) / (self.rewarm_steps + 1))

    def _restore(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()  # before a checkpoint is saved

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < self.start_step:
            return
        if not self._scales:
            ternary.convert(pl_module, self._chosen)
            self._scales = self._measure(trainer, pl_module)[1]
            every = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
            mine = sum(pl_module.get_submodule(name).weight.numel() for name in self._chosen)  # type: ignore[operator,union-attr,misc]
            rank_zero_info(
                f"TernaryQAT: {len(self._chosen)} layers, {mine / every:.0%} of the weights, are ternary now"
            )
        elif not self._codes:
            self._measure(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for layer in ternary.layers(pl_module).values():
            layer.forget()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._scales or trainer.global_step == self._step:
            return  # not begun, or gradients are still being accumulated
        self._step = trainer.global_step
        logged, scales = self._measure(trainer, pl_module)
        drift = [abs(scales[name] / start - 1) for name, start in self._scales.items()]
        logged |= {"scale_drift": sum(drift) / len(drift), "lr_factor": self.factor(trainer.global_step - 1)}
        for name, value in logged.items():
            pl_module.log(f"ternary/{name}", value, batch_size=1, rank_zero_only=False)

    @torch.no_grad()
    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[dict[str, float], dict[str, float]]:
        """Over all ranks: the shares of zeros, and of codes that are others than when it was last measured; and the mean scale
        of each layer."""
        numbers, sizes = [], []  # of each layer: zeros, flips and the sum of scales; weights and groups
        for name in self._chosen:
            layer: Any = pl_module.get_submodule(name)
            weight = layer.own_weight()
            packed, scales, codes = ops.survey_ternary(weight, layer.group_size, self._codes.get(name))
            numbers.append(torch.cat([codes.double(), scales.double().sum()[None]]))
            sizes.append([weight.numel(), scales.numel()])
            self._codes[name] = packed
        counts = torch.cat(
            [torch.stack(numbers).cpu(), torch.tensor(sizes, dtype=torch.float64)], 1
        )  # a GPU is asked once
        if trainer.world_size > 1:
            counts = trainer.strategy.reduce(counts.to(pl_module.device), reduce_op="sum").cpu()  # type: ignore[arg-type,union-attr]
        zeros, flips, _, weights, _ = counts.sum(0).tolist()
        means = dict(zip(self._chosen, (counts[:, 2] / counts[:, 4]).tolist(), strict=True))
        return {"zeros": zeros / weights, "flips": flips / weights}, means

    def state_dict(self) -> dict[str, Any]:
        return {"groups": self._chosen if self._scales else {}, "scales": dict(self._scales)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """What was ternary is so again, before any batch."""
        theirs = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("groups", {})
        if theirs and trainer.state.fn == "fit" and theirs != self._chosen:
            raise ConfigurationError(
                f"the checkpoint has {_describe(theirs)}, and this TernaryQAT makes {_describe(self._chosen)}: give it the"
                " modules and the group_size of the checkpoint"
            )
        ternary.convert(pl_module, theirs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scales, self._codes = dict(state_dict["scales"]), {}


def _describe(groups: dict[str, int]) -> str:
    kinds = sorted({name.rpartition(".")[2] for name in groups})
    sizes = sorted(set(groups.values()))
    return f"{len(groups)} ternary layers ({', '.join(kinds)}; group size {', '.join(map(str, sizes))})"
