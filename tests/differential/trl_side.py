"""TRL's side: it is given its responses through `rollout_func`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from both_sides import GROUP, MAX_TOKENS, TEMPERATURE, Row, Step, Walk, flat_gradient

from lit_rl import encoding


def trl(
    folder: Path, rows: list[Row], *, length: float = 0.1, steps: int = 1, vllm: dict | None = None, **settings: Any
) -> tuple[list[Step], list[dict]]:
    """The optimizer steps that TRL takes, and the inputs of each of its losses.

    vllm: options of its importance sampling, which it has for vLLM alone; the responses are then said to come from there.
    """
    from datasets import Dataset
    from transformers import LlamaForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    taken: list[Step] = []
    losses: list[float] = []
    inputs_seen: list[dict] = []

    class Recording(GRPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            losses.append(float(loss.detach()))
            inputs_seen.append(inputs)
            return loss

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            taken.append(Step(sum(losses), flat_gradient(model)))
            losses.clear()

    def rollout(prompts: list[str], trainer: Any) -> dict:
        groups = {p: iter([row for row in rows if row.prompt == p]) for p in dict.fromkeys(prompts)}
        drawn = [next(groups[p]) for p in prompts]
        return {
            "prompt_ids": [row.prompt_ids for row in drawn],
            "completion_ids": [row.ids for row in drawn],
            "logprobs": [row.sampler_logps.tolist() for row in drawn],
        }

    def reward(completions: list[str], **kwargs: Any) -> list[float | None]:
        rewards = {row.text: row.reward for row in rows}
        return [rewards[text] for text in completions]

    options = dict(
        per_device_train_batch_size=len(rows),
        num_generations=GROUP,
        max_completion_length=MAX_TOKENS,
        temperature=TEMPERATURE,
        epsilon=0.2,
        use_bias_correction_kl=False,
        shuffle_dataset=False,
        max_steps=steps,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = LlamaForCausalLM.from_pretrained(folder)
    trainer = Recording(
        model,
        reward_funcs=reward,
        args=GRPOConfig(tempfile.mkdtemp(), **{**options, **(vllm or {}), **settings}),
        train_dataset=Dataset.from_list([{"prompt": p} for p in dict.fromkeys(row.prompt for row in rows)]),
        processing_class=encoding.tiny_tokenizer(),
        callbacks=[Record()],
        optimizers=(Walk(model.parameters(), length), None),
        rollout_func=rollout,
    )
    if vllm is not None:  # no engine is started, and there are no weights to send it
        trainer.use_vllm, trainer._last_loaded_step = True, 0
    trainer.train()
    return taken, inputs_seen
