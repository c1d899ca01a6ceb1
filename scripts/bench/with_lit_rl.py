"""lit-rl's side: GRPO with TRL's defaults for the loss (no reference policy, a mean over all tokens), else as it comes."""

from functools import partial

import lightning.pytorch as L
from shapes import Meter, Shape, arguments
from torch.optim import adam
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401  (part of the import)

from lit_rl import GRPO, Sampling, Task, ops
from lit_rl.datamodules import TaskData
from lit_rl.generation import native  # noqa: F401


class Prompts(TaskData):
    def __init__(self, shape: Shape, steps: int) -> None:
        super().__init__(batch_size=shape.prompts)
        self.shape, self.steps = shape, steps

    def tasks(self, split: str) -> list[Task]:
        return [Task(text, partial(self.shape.reward, text)) for text in self.shape.texts] * self.steps


class Steps(L.Callback):
    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_train_batch_end(self, *args: object) -> None:
        self.meter.step_ended()


def main() -> None:
    shape, folder, steps, settings, device = arguments()
    precision = settings.pop("precision", "32-true")
    meter = Meter(device)
    meter.start()
    policy = GRPO(
        folder,
        kl_coef=0.0,
        aggregate="token",
        group=shape.samples,
        chat="never",
        sampling=Sampling(max_new_tokens=shape.new_tokens),
        lr=1e-6,
        schedule="linear",
        **settings,
    )
    policy.respond = meter.generating(
        policy.respond,
        lambda result: (sum(map(len, result[1])), sum(len(c.tokens) for group in result[2] for c in group)),
    )
    for module in (policy.model.base_model, policy.model.get_output_embeddings()):
        module.forward = meter.model(module.forward)
    policy.backward = meter.model(policy.backward)
    ops.linear_logprob, adam.adam = meter.model(ops.linear_logprob), meter.model(adam.adam)
    trainer = L.Trainer(
        max_steps=steps + 1,
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        precision=precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Steps(meter)],
    )
    trainer.fit(policy, Prompts(shape, steps + 1))
    meter.print()


if __name__ == "__main__":
    main()
