"""Policy: an actor that learns. It turns tasks into experience, and experience into a loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_rl import encoding, models, ranks, sharding
from lit_rl.actor import Actor
from lit_rl.checks import require
from lit_rl.experience import Experience, build
from lit_rl.forward import Forward
from lit_rl.guard import Guard
from lit_rl.inner import InnerLoop
from lit_rl.mup import MuP, groups, initialise, scales
from lit_rl.objectives import token_weights
from lit_rl.schedules import Schedule
from lit_rl.stopping import Stopping
from lit_rl.task import Task, Verdict

Aggregate = Literal["token", "sequence", "constant"]


class Policy(InnerLoop, Actor):
    """A language model that learns. A method defines `collect(tasks) -> Experience` and `loss(slice) -> Tensor`.

    The experience of a batch is cut into `minibatches`, each into slices that fit `microbatch_tokens`, and trained on as
    `InnerLoop` does.

    Args:
        model, **kwargs: As in Actor.
        lr: Learning rate of AdamW; LightningCLI's `--optimizer` and `--lr_scheduler` (stepped as the Trainer is) replace both.
        weight_decay: Of AdamW.
        schedule: Of the learning rate, over the Trainer's steps; "wsd" (warm-up, stable, decay) falls at the end alone.
        warmup_steps: Trainer steps in which the learning rate rises from zero.
        decay_share: Share of the steps in which "wsd" falls.
        epochs: Passes over each experience.
        minibatches: Optimizer steps a pass; a group is never divided between two.
        microbatch_tokens: Tokens in one forward and backward at most, those of a prompt that responses share counted once: lower
            it when memory runs out, the gradient stays the same. (A CPU gets an eighth of them at a time, which is as fast.)
        gradient_checkpointing: Trades time for memory.
        mup: Learning rates that hold for any width of the model, and weights to begin with where it is made, not loaded.
            The folder of such a model, loaded with the same `mup`, goes on as it began. None is the ordinary one.
        max_non_finite: Optimizer steps in a row whose loss or gradient may be infinite or NaN: each is skipped, counted as
            skipped/non_finite and kept as a file; then training stops.
    """

    splits_groups: bool = True
    """Whether rows of a group may be in different slices (not different minibatches) when memory demands it."""
    aggregate: Aggregate = "token"

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        lr: float = 1e-6,
        weight_decay: float = 0.0,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
        decay_share: float = 0.1,
        epochs: int = 1,
        minibatches: int = 1,
        microbatch_tokens: int = 16384,
        gradient_checkpointing: bool = False,
        mup: MuP | None = None,
        max_non_finite: int = 10,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        for name, value in {
            "epochs": epochs,
            "minibatches": minibatches,
            "microbatch_tokens": microbatch_tokens,
        }.items():
            require(value >= 1, name, value, "at least 1")
        for name, number in {"lr": lr, "weight_decay": weight_decay, "warmup_steps": warmup_steps}.items():
            require(number >= 0, name, number, "at least 0")
        require(0 < decay_share <= 1, "decay_share", decay_share, "a share above 0 and at most 1")
        self.lr, self.weight_decay = lr, weight_decay
        self.schedule, self.warmup_steps, self.decay_share = schedule, warmup_steps, decay_share
        self.epochs, self.minibatches, self.microbatch_tokens = epochs, minibatches, microbatch_tokens
        if gradient_checkpointing:
            (getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable)()
        self.mup = MuP(**mup) if isinstance(mup, dict) else mup
        if self.mup is not None:
            require(self.adapters is None, "lora", "set", "None with mup: adapters have no width to scale by")
            if isinstance(model, str) and models.is_tiny(model):
                initialise(self.model, self.mup)
            scales(self.model, self.mup)  # complains here, and not in the Trainer
        self.token_terms = Forward(self.model)
        self.guard, self.stopping = Guard(max_non_finite), Stopping()
        self.planned: list[list[Experience]] = []
        """This step's minibatches of slices."""
        self.losses: list[float] = []
        """Of the slices so far in this step."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW's, of the weights that learn."""
        if self.mup is not None:
            return groups(self.model, self.mup, self.lr, self.weight_decay)
        trained = [p for p in self.parameters() if p.requires_grad]
        return [{"params": trained, "lr": self.lr, "weight_decay": self.weight_decay}]

    def collect(self, tasks: list[Task]) -> Experience:
        """The experience of one batch of tasks, with advantages (if the method has any) but without weights."""
        raise NotImplementedError

    def loss(self, x: Experience) -> Tensor:
        """The loss of one slice: a sum over its tokens, already weighted. Slices of a minibatch add up."""
        raise NotImplementedError

    def demonstrations(self, tasks: list[Task], longest: int | None = None) -> Experience:
        """The tasks' known responses as off-policy rows; those of more than `longest` tokens, and those that do not fit the
        model's context, are left out and counted."""
        tasks, prompts = self.encode(tasks, 1)
        limit = models.context_length(self.model)
        rows = []
        for g, (task, prompt) in enumerate(zip(tasks, prompts, strict=True)):
            _, think, space = self.tokenizer.decode(prompt[-8:]).rpartition("<think>")
            for i, text in enumerate(task.responses):
                if think and not space.strip():  # the chat template has begun the thinking already
                    text = text.removeprefix(think).removeprefix(space)
                response = encoding.encode_response(self.tokenizer, text, self.eos)
                if response and len(response) <= min(longest or limit, limit - len(prompt)):
                    rows.append((prompt, response, g, task.rewards[i] if task.rewards else 1.0, text))
                else:
                    self.count("skipped/response_too_long")
        x = build(
            [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], tasks, self.tokenizer.pad_token_id or 0
        )
        x.rewards, x.texts = torch.tensor([r[3] for r in rows], dtype=torch.float32), [r[4] for r in rows]
        x.off_policy = torch.ones(len(x), dtype=torch.bool)
        return x

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.stopping.at_once():
            return super().generate(*args, **kwargs)

    def score(self, tasks: list[Task], texts: list[str]) -> list[Verdict]:
        with self.stopping.at_once():
            return super().score(tasks, texts)

    def begin(self, batch: list[Task]) -> None:
        """A step begins: what was counted in the last one is gone."""
        self.counts, self.seconds, self.sampled_tokens, self._copies = {}, {}, 0, {}
        if left_out := getattr(self.trainer.train_dataloader, "left_out", 0):
            self.count("skipped/task_failed", left_out)
        for i, task in enumerate(batch):
            task.turn = self.trainer.global_step, 0, i
        self.losses = []

    def prepare(self, batch: list[Task]) -> None:
        with sharding.gathered(self.model):
            self.token_terms.check(self.device)
            self.planned = self.plan(self.collect(batch))

    def plan(self, x: Experience) -> list[list[Experience]]:
        """Minibatches of slices. Fills `x.weights`, so that over all ranks they add up to one in each minibatch (or to less:
        rows that cannot give a gradient are then left out)."""
        if len(x):
            x.weights = torch.zeros_like(x.mask, dtype=torch.float32)
        minibatches: list[list[Experience]] = []
        mine = torch.tensor(self.owners(x), dtype=torch.long) == self.global_rank
        group = mine.cumsum(0) - 1  # at the places of this rank's groups
        for part in torch.arange(len(mine)).tensor_split(self.minibatches):
            groups = group[part][mine[part]]
            rows = torch.isin(x.group, groups).nonzero().flatten()
            mask = x.mask[rows] & x.valid[rows, None]
            total = float(mask.sum()) if self.aggregate == "token" else float(mask.any(1).sum())
            everywhere = self.sum_over_ranks(total)
            if len(rows) and x.weights is not None:
                share = total / everywhere * self.trainer.world_size if everywhere else 0.0
                x.weights[rows] = token_weights(mask, self.aggregate, self.sampling.max_new_tokens).float() * share
                rows = rows[self.has_gradient(x)[rows]]
            minibatches.append(self.slices(x, rows))
        counts = ranks.gather([len(slices) for slices in minibatches])
        for slices, *each in zip(minibatches, *counts, strict=True):  # a sharded model's passes need all ranks
            slices += [self._idle_slice() for _ in range(max(each) - len(slices))]
        if self.trainer.is_global_zero:  # it is so on all ranks, and counts once
            self.count("skipped/no_signal", float(not any(minibatches)))
        return minibatches

    def owners(self, x: Experience) -> list[int]:
        """The rank of each group of the batch of all ranks, in the order that the groups have in one process."""
        mine = [(task.turn or (0, i), self.global_rank) for i, task in enumerate(x.tasks)]
        return [rank for *_, rank in sorted(place for part in ranks.gather(mine) for place in part)]

    def has_gradient(self, x: Experience) -> Tensor:
        """(N,) bool: the rows that the loss depends on."""
        assert x.weights is not None
        return (x.weights != 0).any(1)

    def slices(self, x: Experience, rows: Tensor) -> list[Experience]:
        """Cuts rows into slices of about equally long groups, each within `microbatch_tokens` unless a row, or
        a group that is not to be divided, exceeds it."""
        pads = self.token_terms.pads(self.device)
        lengths, prompts = x.lengths.tolist(), x.starts.tolist()
        units: list[tuple[int, list[int]]] = []  # (tokens, rows): groups, or parts of those that are too large
        for g in x.group[rows].unique_consecutive().tolist():
            size, part = 0, list[int]()
            for r in rows[x.group[rows] == g].tolist():
                more = lengths[r] - (prompts[r] if part and not pads else 0)  # packed, they share their prompt
                if part and size + more > self.microbatch_tokens and self.splits_groups:
                    units.append((size, part))
                    size, part, more = 0, [], lengths[r]
                size += more
                part.append(r)
            units.append((size, part))
        units.sort(key=lambda unit: -unit[0])
        slices: list[list[int]] = []
        longest = held = 0
        for size, part in units:
            taken = longest if pads else size  # with padding to the longest unit
            enough = held >= self.microbatch_tokens / 8 and (
                self.device.type == "cpu"  # which gains nothing from more at once
                or (pads and size < 0.75 * longest)  # padding would cost more than a slice
            )
            if not slices or enough or held + taken > self.microbatch_tokens:
                slices.append([])
                longest, taken, held = size, size, 0
            slices[-1] += part
            held += taken
        return [x.rows(sorted(part)) for part in slices]

    @property
    def temperature(self) -> float:
        """Of the distribution that is trained."""
        return 1.0

    @torch.no_grad()
    def logps_of(self, forward: Forward, x: Experience, temperature: float | None = None) -> Tensor:
        """(N, T) log-probabilities under a model as it is, without gradient, slice by slice; at the temperature that is
        trained, if at no other."""
        temperature = self.temperature if temperature is None else temperature
        result = torch.zeros(x.tokens.shape)
        x = Experience(**{**vars(x), "extra": {**x.extra, "_row": torch.arange(len(x))}})
        device = next(forward.model.parameters()).device
        with self.precision(), sharding.gathered(forward.model):
            forward.check(device)
            for part in self.slices(x, torch.arange(len(x))):
                logps, _ = forward(part.to(device), temperature)
                result[part.extra["_row"], : logps.shape[1]] = logps.to(result)
        return result

    def _idle_slice(self) -> Experience:
        x = build([[0]], [[0]], [0], [])
        x.weights = x.advantages = x.logps = torch.zeros_like(x.tokens, dtype=torch.float32)
        return x

    @property
    def rate(self) -> float:
        """The learning rate of this step."""
        own = {id(p) for p in self.parameters()}
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        return next(float(group["lr"]) for group in groups if any(id(p) in own for p in group["params"]))

    def log_step(self) -> dict[str, float]:
        taken = self.epochs * sum(map(bool, self.planned))
        loss = self.sum_over_ranks(sum(self.losses)) / self.trainer.world_size / max(1, taken)
        self.log("loss", loss)
        everyone, engines = zip(*ranks.gather((self.counts, getattr(self.generator, "numbers", {}))), strict=True)
        for name in sorted({name for numbers in engines for name in numbers}):
            self.log(name, max(numbers.get(name, 0.0) for numbers in engines))
        for name in sorted({name for counts in everyone for name in counts}):
            self.log(name, sum(counts.get(name, 0.0) for counts in everyone), reduce_fx="sum")
        return {"loss": loss}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lit_rl"]["guard"] = self.guard.in_a_row, self.guard.dumps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.guard.in_a_row, self.guard.dumps = checkpoint.get("lit_rl", {}).get("guard", (0, 0))
