"""The same training in TRL and in lit-rl, as a user of either would write it: same weights, responses and rewards.

TRL is given its responses through `rollout_func`, lit-rl through a generator that replays them. Both take real optimizer
steps, which leave the sampling policy behind by a fixed length, so that later ratios are away from one by themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from lit_rl import RLCallback, Sampling, Task, models
from lit_rl.datamodules.base import TaskData
from lit_rl.generation.base import Completion
from lit_rl.rollout import Rollout
from lit_rl.scoring import Scorer

GROUP, MAX_TOKENS, TEMPERATURE = 4, 9, 0.7
REWARDS: dict[str, Sequence[float | None]] = {  # a group of all right, one of mixed, one of graded responses
    "a": (1.0, 1.0, 1.0, 1.0),
    "what is it": (1.0, 0.0, 0.0, 0.0),
    "which one": (0.25, -1.0, 0.5, 2.0),
}


@dataclass
class Row:
    prompt: str
    prompt_ids: list[int]
    text: str
    ids: list[int]
    reward: float | None
    finished: bool
    sampler_logps: Tensor


@dataclass
class Step:
    loss: float
    gradient: Tensor
    """Of all parameters, flat."""
    size: float = 0.0
    """The sum of the loss's terms without their signs, which is what its rounding is relative to."""


def make(folder: Path) -> list[Row]:
    """Writes a tiny random Llama into `folder` and returns the rows to train it on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = models.tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rng, rows = random.Random(0), []
    for prompt, rewards in REWARDS.items():
        for i, reward in enumerate(rewards):
            text = "".join(rng.choices("abcdefghij", k=rng.randint(1, MAX_TOKENS - 1)))
            finished = i != 2  # one of each group is cut off at the limit
            text = text if finished else text.ljust(MAX_TOKENS, "z")
            prompt_ids = models.encode_prompt(tokenizer, prompt)
            ids = models.encode_response(tokenizer, text, [tokenizer.eos_token_id] if finished else [])
            rows.append(Row(prompt, prompt_ids, text, ids, reward, finished, torch.zeros(len(ids))))
            logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1] / TEMPERATURE
            logps = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).squeeze(-1).detach()
            rows[-1].sampler_logps = logps + 0.4 * torch.randn(len(ids))  # an engine that disagrees with the trainer
    assert len({row.text for row in rows}) == len(rows)
    return rows


class Walk(torch.optim.Optimizer):
    """A step of fixed length against the gradient, whatever its scale."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for g in self.param_groups for p in g["params"]]
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
        for p in parameters:
            p -= self.param_groups[0]["lr"] * p.grad / norm
        return loss


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# ------------------------------------------------------------------------------------------------------------- TRL


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
        args=GRPOConfig("trl", **{**options, **(vllm or {}), **settings}),
        train_dataset=Dataset.from_list([{"prompt": p} for p in dict.fromkeys(row.prompt for row in rows)]),
        processing_class=models.tiny_tokenizer(),
        callbacks=[Record()],
        optimizers=(Walk(model.parameters(), length), None),
        rollout_func=rollout,
    )
    if vllm is not None:  # no engine is started, and there are no weights to send it
        trainer.use_vllm, trainer._last_loaded_step = True, 0
    trainer.train()
    return taken, inputs_seen


# ---------------------------------------------------------------------------------------------------------- lit-rl


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


class Prompts(TaskData):
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
    ).fit(policy, Prompts(rows))
    return record
