"""TRL's side: GRPOTrainer with its defaults, but for the settings that it is given."""

import tempfile

from datasets import Dataset
from shapes import Meter, arguments
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback  # noqa: F401
from trl import GRPOConfig, GRPOTrainer


class Steps(TrainerCallback):
    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.meter.step_ended()


def main() -> None:
    shape, folder, steps, settings, device = arguments()
    meter = Meter(device)
    meter.start()
    rows = shape.prompts * shape.samples
    micro_batch = min(rows, shape.micro_batch)

    def reward(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
        return [shape.reward(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]

    trainer = GRPOTrainer(
        folder,
        reward_funcs=reward,
        args=GRPOConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=rows // micro_batch,
            num_generations=shape.samples,
            max_completion_length=shape.new_tokens,
            max_steps=steps + 1,
            shuffle_dataset=False,  # each step has all prompts, on both sides
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in shape.texts] * (steps + 1)),
        callbacks=[Steps(meter)],
    )
    trainer._generate = meter.generating(
        trainer._generate, lambda result: (sum(map(len, result[0])) // shape.samples, sum(map(len, result[1])))
    )
    trainer.train()
    meter.print()


if __name__ == "__main__":
    main()
