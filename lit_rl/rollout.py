"""Rollout: the pipeline from tasks to a policy-gradient loss. Its methods differ in settings, not in code."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from inspect import signature
from typing import Any, ClassVar, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lit_rl import adapters, hooks, models, objectives, rounds
from lit_rl.actor import Responses
from lit_rl.advantage import ADVANTAGES
from lit_rl.ahead import Ahead
from lit_rl.checks import require
from lit_rl.chunked import Chunks, lag
from lit_rl.experience import Experience, Terms, build
from lit_rl.forward import Forward
from lit_rl.generation.base import Completion
from lit_rl.policy import Aggregate, Policy
from lit_rl.task import Task


class Rollout(Policy):
    """Policy-gradient learning from sampled responses:

        tasks -> generate -> score -> on_rollout -> advantage -> on_advantage -> weights        (collect, once a batch)
        forward -> terms -> on_loss -> (loss * weights).sum()                                   (loss, once a slice)

    Args:
        model, **kwargs: As in Policy.
        group: Responses a prompt.
        advantage: How rewards become advantages; a name in lit_rl.advantage.
        aggregate: What a minibatch's loss is a mean over: "token" (all response tokens alike), "sequence" (tokens within a
            response, then responses), "constant" (tokens over rows times `sampling.max_new_tokens`).
        objective: "ppo" is the clipped surrogate, "cispo" the clipped importance weight, "sapo" a soft gate and "vespo" a soft
            weight of whole sequences in place of the clip, "reinforce" none of these.
        ratio: Of each "token", or one a "sequence" (GSPO).
        clip_low: The ratio is clipped below 1 - clip_low.
        clip_high: And above 1 + clip_high.
        dual_clip: For negative advantages the loss is at most this times |advantage| (Ye et al. 2020); None is off.
        cap: Of CISPO's weight: an absolute value, at least 1.
        kl_coef: Weight of the divergence from the reference policy, which is the policy before training; 0 needs no reference.
        kl_estimator: Of that divergence (Schulman 2020; "k3+" has the value of k3 and the gradient of k2).
        kl_in_reward: Subtract it from the reward instead of adding it to the loss.
        entropy_coef: Weight of the entropy bonus.
        old_logps: The denominator of the ratio: the "sampler"'s log-probabilities, those the trainer "recompute"s, or
            "auto": the sampler's where they are exact, else the trainer's.
        tis_cap: Truncated importance sampling: each token's loss times the ratio of the trainer's to the sampler's
            probability, at most this; None is off. For engines whose log-probabilities differ from the trainer's.
        mask_truncated: Responses cut off at the length limit give no gradient.
        overlong_buffer: Share of `sampling.max_new_tokens` at its end in which a penalty grows from 0 to
            `overlong_factor` (DAPO eq. 13); 0 is off.
        overlong_factor: The penalty of the longest response.
        dynamic_sampling: Replace groups whose rewards are all equal by groups of further prompts, until the batch is full.
        max_rounds: How often dynamic sampling, or a batch that waits for its chunks, may ask for prompts, in all.
        chunk: Chunk-wise rollout (MiniCPM4, arXiv 2506.07900, Algorithm 1): a round samples at most this many tokens of each
            response. Unfinished responses continue in later rounds and steps, with newer weights; a token's ratio is taken
            against the weights that sampled it. Groups are trained on when all their responses are finished, the oldest
            first, as many as the batch has tasks; further prompts are begun while there are fewer. None is off.
        ahead: One-step-off rollout: a step's first round is sampled while the step before trains, on a thread, by a copy of
            the weights from before that step's update: "thread" on the same device, or the name of another. The first step
            samples its own batch, and begins a further one; then each step trains on the batch begun one step before. A
            checkpoint holds that batch, since nothing else has the weights that sample it, and waits until it is sampled.
            None is off.
    """

    refused: ClassVar[dict[type[L.Callback], str]] = Policy.refused | {
        LearningRateFinder: "it compares losses, and that of a policy gradient does not tell what was learned: set model.lr"
    }

    def __init__(
        self,
        model: str | nn.Module = "tiny",
        *,
        group: int = 8,
        advantage: Literal[
            "grpo", "lite_ppo", "dr_grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "opo", "rft"
        ] = "grpo",
        aggregate: Aggregate = "sequence",
        objective: Literal["ppo", "cispo", "sapo", "vespo", "reinforce"] = "ppo",
        ratio: Literal["token", "sequence"] = "token",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        cap: float = 5.0,
        kl_coef: float = 0.0,
        kl_estimator: Literal["k1", "k2", "k3", "k3+"] = "k3",
        kl_in_reward: bool = False,
        entropy_coef: float = 0.0,
        old_logps: Literal["auto", "sampler", "recompute"] = "auto",
        tis_cap: float | None = None,
        mask_truncated: bool = False,
        overlong_buffer: float = 0.0,
        overlong_factor: float = 1.0,
        dynamic_sampling: bool = False,
        max_rounds: int = 10,
        chunk: int | None = None,
        ahead: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        for name, value, least in (("group", group, 1), ("clip_high", clip_high, 0), ("kl_coef", kl_coef, 0)):
            require(value >= least, name, value, f"at least {least}")
        for name, share in (("clip_low", clip_low), ("overlong_buffer", overlong_buffer)):
            require(0 <= share <= 1, name, share, "between 0 and 1")
        require(max_rounds >= 1, "max_rounds", max_rounds, "at least 1")
        limit = "at least 1, since it caps the ratio itself: below, it would scale every token down"
        require(cap >= 1, "cap", cap, limit)
        require(dual_clip is None or dual_clip > 1, "dual_clip", dual_clip, "above 1")
        require(tis_cap is None or tis_cap >= 1, "tis_cap", tis_cap, "at least 1")
        limit = "None with old_logps=sampler: all ratios are 1"
        require(tis_cap is None or old_logps != "sampler", "tis_cap", tis_cap, limit)
        limit = "off when group is 1: one reward never differs"
        require(not dynamic_sampling or group > 1, "dynamic_sampling", True, limit)
        self._check_engine(chunk, ahead)
        self.group, self.advantage, self.aggregate = group, advantage, aggregate
        self.objective, self.ratio = objective, ratio
        self.clip_low, self.clip_high, self.dual_clip, self.cap = clip_low, clip_high, dual_clip, cap
        self.kl_coef, self.kl_estimator, self.kl_in_reward = kl_coef, kl_estimator, kl_in_reward
        self.entropy_coef = entropy_coef
        self.old_logps, self.tis_cap, self.mask_truncated = old_logps, tis_cap, mask_truncated
        self.overlong_buffer, self.overlong_factor = overlong_buffer, overlong_factor
        self.dynamic_sampling, self.max_rounds = dynamic_sampling, max_rounds
        self.chunks: Chunks | None = None
        if chunk is not None or ahead is not None:
            longest, device = self.sampling.max_new_tokens, None if ahead == "thread" else ahead
            thread = None if ahead is None else Ahead(copy.deepcopy(self.model), device)
            self.chunks = Chunks(min(chunk or longest, longest), longest, self.decode, thread)
        self._rewards = (0.0, 0)
        self.reference: nn.Module | None = None
        self.reference_terms = self.token_terms  # the policy without its adapters, which are zero at first
        if kl_coef and not adapters.at_start(self.model):
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
            self.reference_terms = Forward(self.reference)

    def _check_engine(self, chunk: int | None, ahead: str | None) -> None:
        """What the engine and the model must be able to do."""
        engine, longest = type(self.generator).__name__, self.sampling.max_new_tokens
        context = models.context_length(self.model)
        require(longest < context, "sampling.max_new_tokens", longest, f"below the model's context of {context} tokens")
        limit = (
            f"without top_p, top_k and min_p in training with {engine}, which does not tell how much probability they keep:"
            " leave them at 1, 0 and 0, or leave the generator out (the native one tells)"
        )
        tells = not self.sampling.cuts or getattr(self.generator, "keeps_mass", True)
        require(tells, "sampling", self.sampling, limit)
        if chunk is not None:
            limit = (
                f"a divisor of sampling.max_new_tokens ({longest}), or that or more, which is one chunk; null is off"
            )
            require(chunk >= longest or (chunk >= 1 and longest % chunk == 0), "chunk", chunk, limit)
            limit = f"null with {engine}: its `generate` takes no `begun` responses"
            require("begun" in signature(self.generator.generate).parameters, "chunk", chunk, limit)
        if ahead is not None:
            limit = f"null with {engine}: the native engine alone samples by a copy of the weights"
            require(getattr(self.generator, "exact", False), "ahead", ahead, limit)
            try:
                torch.empty(0, device=None if ahead == "thread" else ahead)
            except (RuntimeError, AssertionError) as error:
                require(False, "ahead", ahead, f"thread, or a device that is here ({str(error).splitlines()[0]})")

    # ---------------------------------------------------------------- tasks to experience

    def setup(self, stage: str) -> None:
        if self.chunks is not None and self.chunks.ahead is not None:
            whole = not isinstance(self.trainer.strategy, ModelParallelStrategy)
            require(whole, "ahead", "set", "null when the strategy shards the model: use ddp, or leave it out")
            fine = self.trainer.precision in ("32-true", "16-mixed", "bf16-mixed")
            limit = f"null at precision {self.trainer.precision}, whose default dtype is that of all threads: use a mixed one"
            require(fine, "ahead", "set", limit)
        if self.chunks is not None and stage == "fit":
            self.chunks.load_state_dict({})  # another run's, if the policy was in one; a checkpoint comes later
        super().setup(stage)

    def collect(self, tasks: list[Task]) -> Experience:
        x = self.finish(rounds.fill(self, tasks))
        if self.chunks is not None:
            self.chunks.end_step(self, x, int(self.sum_over_ranks(len(tasks))))
        return x

    def finish(self, x: Experience) -> Experience:
        """From rewards to advantages; `on_advantage` has seen the result."""
        own = x.valid & ~x.off_policy
        self._rewards = (float(x.rewards[own].sum()), int(own.sum()))
        if not len(x) and self.trainer.world_size == 1:
            return x
        if round(self.overlong_buffer * self.sampling.max_new_tokens):
            limit = self.sampling.max_new_tokens
            x.rewards += objectives.overlong_penalty(
                x.response_lengths, limit, round(self.overlong_buffer * limit), self.overlong_factor
            )
        if self.takes_sampler_logps:
            x.logps = x.sampler_logps
        else:
            stale, known = lag(x, self.trainer.global_step) > 0, x.logps
            several = self.epochs * self.minibatches > 1 or bool(stale.any())
            x.logps = None  # the loss takes its own, detached: the same numbers
            if self.old_logps == "recompute" or several or self.kl_in_reward:
                now = self.logps_of(self.token_terms, x)
                x.logps = now if known is None else torch.where(stale, known, now)
        if self.kl_coef:
            with nullcontext() if self.reference is not None else adapters.disabled(self.model):
                x.ref_logps = self.logps_of(self.reference_terms, x)
            if self.kl_in_reward and x.logps is not None:
                divergence = objectives.kl(x.logps, x.ref_logps, x.mask, self.kl_estimator).sum(1)
                x.rewards -= self.kl_coef * torch.where(x.off_policy, 0.0, divergence)  # of the policy's own samples
        x.advantages = ADVANTAGES[self.advantage](x.rewards, x.group, x.mask, x.valid)
        hooks.call(self.trainer, "on_advantage", x, module=self)
        if len(x) and not x.advantages.any():
            self.warn(
                "groups/no_signal",
                "in one step the responses to each prompt were rewarded alike, and taught nothing. Where many steps are so, the"
                " tasks are too hard or too easy for the policy: change them, warm-start it by SFT, or raise `group`.",
            )
        if self.mask_truncated:
            x.mask &= ~x.truncated[:, None]
        return x

    def log_step(self) -> dict[str, float]:
        main = super().log_step()
        total, count = (self.sum_over_ranks(value) for value in self._rewards)
        if count:
            main["reward"] = total / count
            self.log("reward", main["reward"], prog_bar=True)
        for name, value in self.chunks.measures().items() if self.chunks is not None else ():
            self.log(f"chunked/{name}", value)
        return main

    def round(self, tasks: list[Task]) -> Experience:
        """Generates and scores; `on_rollout` has seen the result."""
        return self.rewarded(self.scored(*self.draw(tasks)))

    def draw(self, tasks: list[Task]) -> Responses:
        """Responses to these tasks; in chunks, to all whose last response the next chunk finishes."""
        return self.respond(tasks, self.group, "train") if self.chunks is None else self.chunks.draw(self, tasks)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if self.chunks is not None and self.chunks.ahead is not None:
            self.chunks.ahead.wait()
        return super().generate(*args, **kwargs)

    def scored(self, tasks: list[Task], prompts: list[list[int]], completions: list[list[Completion]]) -> Experience:
        """What `draw` returns, as rows with the verifier's verdicts, and with their scores for rewards."""
        flat = [c for group in completions for c in group]
        index = [g for g, group in enumerate(completions) for _ in group]
        x = build(
            [prompts[g] for g in index],
            [c.tokens.tolist() for c in flat],
            index,
            tasks,
            self.tokenizer.pad_token_id or 0,
        )
        x.texts = [c.text for c in flat]
        x.verdicts = self.score([tasks[g] for g in index], x.texts)
        x.rewards = torch.tensor([v.score for v in x.verdicts], dtype=torch.float32)
        x.valid = torch.tensor([v.valid for v in x.verdicts], dtype=torch.bool)
        x.truncated = torch.tensor([c.finish == "length" for c in flat], dtype=torch.bool)
        if flat:
            x.sampler_logps = torch.zeros(x.tokens.shape).masked_scatter(x.mask, torch.cat([c.logps for c in flat]))
            kept = torch.cat([c.log_kept for c in flat])
            x.log_kept = torch.zeros(x.tokens.shape).masked_scatter(x.mask, kept) if kept.any() else None
        if self.chunks is not None and flat:
            self.chunks.annotate(x, flat)
        return x

    def rewarded(self, x: Experience) -> Experience:
        """Lets `on_rollout` see, and change, the rewards."""
        if len(x) or self.trainer.world_size > 1:  # on all ranks or none: a hook may gather
            hooks.call(self.trainer, "on_rollout", x, module=self)
        return x

    @property
    def takes_sampler_logps(self) -> bool:
        """Whether the ratio is taken against the sampler's own log-probabilities."""
        return self.old_logps == "sampler" or (self.old_logps == "auto" and self.exact_sampler)

    def rank_state(self) -> dict[str, Any]:
        chunks = {} if self.chunks is None else {"chunks": self.chunks.state_dict(self.trainer.global_step)}
        return super().rank_state() | chunks

    def load_rank_state(self, state: dict[str, Any]) -> None:
        super().load_rank_state(state)
        if self.chunks is not None and "chunks" in state:
            self.chunks.load_state_dict(state["chunks"])

    @property
    def exact_sampler(self) -> bool:
        """Whether the sampler's log-probabilities are those of the training forward, up to float32 rounding."""
        single = self.trainer.precision == "32-true" and next(self.model.parameters()).dtype == torch.float32
        whole = torch.get_float32_matmul_precision() == "highest"  # else a GPU's products are rounded to TF32
        return single and whole and getattr(self.generator, "exact", False)

    # ---------------------------------------------------------------- experience to loss

    @property
    def temperature(self) -> float:
        """Of the distribution that is trained: the sampled one, and the plain softmax when that is greedy."""
        return self.sampling.temperature or 1.0

    def has_gradient(self, x: Experience) -> Tensor:
        weighted = super().has_gradient(x)
        every = (self.kl_coef and not self.kl_in_reward) or self.entropy_coef
        if every or any(getattr(c, "needs_all_rows", False) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            return weighted
        assert x.advantages is not None
        return weighted & (x.advantages != 0).any(1)

    def loss(self, x: Experience) -> Tensor:
        terms = self.terms(x)
        hooks.call(self.trainer, "on_loss", x, terms, module=self)
        return terms.total()

    def terms(self, x: Experience) -> Terms:
        """The per-token loss of a slice, before any callback."""
        assert x.weights is not None
        logps, entropy = self.token_terms(x, self.temperature)
        old = logps.detach() if x.logps is None else x.logps
        log_ratio = objectives.log_ratio(logps, old, x.mask, self.ratio)
        loss, clipped = self.surrogate(log_ratio, logps, x)
        if self.tis_cap is not None and x.sampler_logps is not None:
            loss = loss * objectives.truncated_importance(old, x.sampler_logps, x.mask, level="token", cap=self.tis_cap)
        surrogate = loss
        if x.ref_logps is not None and not self.kl_in_reward:
            loss = loss + self.kl_coef * objectives.kl(logps, x.ref_logps, x.mask, self.kl_estimator)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy
        entropy = entropy if self.entropy_coef else entropy.detach()
        return Terms(logps, entropy, loss, x.weights, log_ratio.detach(), clipped, surrogate)

    def surrogate(self, log_ratio: Tensor, logps: Tensor, x: Experience) -> objectives.Objective:
        """(N, T) loss and where its clip is active. What a method with another objective overrides."""
        assert x.advantages is not None
        if self.objective == "cispo":
            return objectives.cispo(log_ratio, logps, x.advantages, x.mask, self.cap)
        if self.objective == "sapo":
            return objectives.sapo(log_ratio, x.advantages)
        if self.objective == "vespo":
            return objectives.vespo(log_ratio, logps, x.advantages, x.mask)
        if self.objective == "reinforce":
            return objectives.Objective(-x.advantages * logps, torch.zeros_like(x.mask))
        return objectives.ppo(log_ratio, x.advantages, self.clip_low, self.clip_high, self.dual_clip)
