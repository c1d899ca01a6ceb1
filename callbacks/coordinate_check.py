"""CoordinateCheck: how large activations are, and how far they move, in the first steps."""

from __future__ import annotations

from typing import Any, ClassVar

import lightning.pytorch as L
import torch
from torch import Tensor

from lit_rl import sharding
from lit_rl.checks import ConfigurationError, require
from lit_rl.hooks import RLCallback

TOKENS = 32


class CoordinateCheck(RLCallback):
    """The test of a parametrisation (arXiv 2203.03466, appendix D): under muP nothing depends on the width, beyond chance.

    In each of the first steps it runs the model on a few fixed random tokens, and logs the mean absolute value of the
    coordinates/embedding, of each coordinates/layer-N (the last one is normed) and of the coordinates/logits; and under
    coordinates/moved/ by how much they differ from those before training. Compare runs of several widths with
    `lit_rl.mup.slope`.

    Args:
        steps: How many are the first steps.
    """

    refuses: ClassVar[dict[str, str]] = {"Group": "its members have widths of their own: check them one at a time"}

    def __init__(self, steps: int = 10) -> None:
        require(steps >= 1, "steps", steps, "at least 1")
        self.steps = steps
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def _look(self, module: Any) -> dict[str, Tensor]:
        model = module.model
        vocabulary = model.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0)).to(module.device)
        with torch.autocast(module.device.type, enabled=False), sharding.gathered(model):
            out = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        names = ["embedding", *(f"layer-{i}" for i in range(1, len(out.hidden_states)))]
        return dict(zip(names, out.hidden_states, strict=True)) | {"logits": out.logits}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not hasattr(pl_module, "model"):
            raise ConfigurationError(f"CoordinateCheck needs a policy of lit-rl, not {type(pl_module).__name__}")
        if trainer.global_step == 0:
            self._before = {name: value.float().cpu() for name, value in self._look(pl_module).items()}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self.steps:
            return
        for name, value in self._look(pl_module).items():
            value = value.float().cpu()
            pl_module.log(f"coordinates/{name}", value.abs().mean(), rank_zero_only=False)
            if name in self._before:
                moved = (value - self._before[name]).abs().mean()
                pl_module.log(f"coordinates/moved/{name}", moved, rank_zero_only=False)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before = state_dict["before"]
