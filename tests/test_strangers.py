"""The monitors on LightningModules of people who never heard of lit-rl: what is logged, against plain sums."""

import math
import warnings
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from test_policy import Letters, trainer
from test_trainer_flags import policy
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lit_rl import SFT, Task, hooks, jsonl
from lit_rl.callbacks import Completions, EntropyMonitor
from lit_rl.experience import Terms, build
from lit_rl.run import RunLogger

VOCABULARY = 24


def language_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def entropy(logits):
    """Of one distribution, (V,), by its definition."""
    p = [math.exp(x) for x in logits.tolist()]
    return -sum(x / sum(p) * math.log(x / sum(p)) for x in p)


def conversations(n=12, length=9):
    """Rows with padding at the end and labels on the last part of what is left."""
    numbers = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        ids = torch.randint(1, VOCABULARY, (length,), generator=numbers)
        mask = (torch.arange(length) < length - i % 4).long()
        labels = torch.where((mask == 1) & (torch.arange(length) >= 3 + i % 2), ids, -100)
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return rows


class FineTuning(L.LightningModule):
    """Fine-tuning as the tutorials write it; `seen` has the entropies of each training batch."""

    def __init__(self):
        super().__init__()
        self.lm = language_model()
        self.seen = []

    def training_step(self, batch, batch_idx):
        out = self.lm(**batch)
        labels, logits = batch["labels"], out.logits.detach().float()
        rows, places = range(len(labels)), range(labels.shape[1] - 1)
        self.seen.append([entropy(logits[i, t]) for i in rows for t in places if labels[i, t + 1] != -100])
        return out.loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.lm(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.lm.parameters(), lr=1e-2)


class Unlabelled(FineTuning):
    """The same with a loss of its own: the model is given no labels."""

    def training_step(self, batch, batch_idx):
        mask = batch["attention_mask"]
        out = self.lm(input_ids=batch["input_ids"], attention_mask=mask)
        logits = out.logits.detach()
        self.seen.append([entropy(logits[i, t]) for i, t in mask.nonzero().tolist()])
        return torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


class Lazy(FineTuning):
    """Makes its model in the hook that Lightning has for it, and another one, frozen, before it."""

    def __init__(self):
        L.LightningModule.__init__(self)
        self.seen = []

    def configure_model(self):
        self.reference = language_model(1).requires_grad_(False)
        self.lm = language_model()

    def training_step(self, batch, batch_idx):
        self.reference(**batch)
        return super().training_step(batch, batch_idx)


def logged(module, data=None, **flags):
    """{step: entropy} as the logger got it, and what was seen."""
    run = trainer(
        **{
            "logger": RunLogger("run"),
            "log_every_n_steps": 1,
            "callbacks": [EntropyMonitor()],
            "max_steps": -1,
            "max_epochs": 2,
            **flags,
        }
    )
    run.fit(module, data or DataLoader(conversations(), batch_size=2), DataLoader(conversations(4), batch_size=2))
    rows = jsonl.read(Path("run/metrics.jsonl"))
    return {row["step"]: row["entropy"] for row in rows if "entropy" in row}


def means(seen, every=1):
    """Of the tokens of so many batches together."""
    parts = [[x for part in seen[i : i + every] for x in part] for i in range(0, len(seen), every)]
    return {step: pytest.approx(sum(part) / len(part), rel=1e-4) for step, part in enumerate(parts)}


@pytest.mark.parametrize("kind", [FineTuning, Unlabelled, Lazy])
@pytest.mark.parametrize(
    "flags",
    [dict(), dict(precision="bf16-mixed"), dict(limit_val_batches=2, val_check_interval=2, num_sanity_val_steps=2)],
    ids=["plain", "bf16", "validated"],
)
def test_entropy_of_fine_tuning(kind, flags):
    module = kind()
    got = logged(module, **flags)
    assert len(module.seen) == 12
    assert got == means(module.seen)
    assert not module.lm._forward_hooks


def test_entropy_is_that_of_an_optimizer_step_when_gradients_accumulate():
    module = FineTuning()
    assert logged(module, accumulate_grad_batches=3) == means(module.seen, every=3)
    assert len(module.seen) == 12


def test_a_second_fit_and_a_failed_one_leave_one_hook():
    class Fails(FineTuning):
        def training_step(self, batch, batch_idx):
            if len(self.seen) == 2:
                self.seen.append([])
                raise RuntimeError("crash")
            return super().training_step(batch, batch_idx)

    module, monitor = Fails(), EntropyMonitor()
    with pytest.raises(RuntimeError, match="crash"):
        logged(module, callbacks=[monitor])
    module.seen.clear()
    Path("run/metrics.jsonl").unlink()
    module.training_step = lambda *a: FineTuning.training_step(module, *a)
    assert logged(module, callbacks=[monitor]) == means(module.seen)


def test_a_module_that_goes_round_its_model_is_told():
    class Parts(FineTuning):
        def training_step(self, batch, batch_idx):
            hidden = self.lm.model(batch["input_ids"]).last_hidden_state
            return self.lm.lm_head(hidden).logsumexp(-1).mean()

    with pytest.warns(
        UserWarning, match="EntropyMonitor saw no training forward in a step.*call the language model itself"
    ):
        assert logged(Parts()) == {}


class Manual(L.LightningModule):
    """Somebody's GRPO on manual optimisation: two prompts a batch, three samples each, two steps a batch."""

    joins = False
    group, length, steps = 3, 4, 2

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.lm = language_model()
        self.numbers = torch.Generator().manual_seed(2)
        self.seen, self.samples = [], []

    @torch.no_grad()
    def sample(self, prompts):
        ids = prompts.repeat_interleave(self.group, 0)
        for _ in range(self.length):
            p = self.lm(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=self.numbers)], 1)
        return ids

    def training_step(self, batch, batch_idx):
        start = batch.shape[1]
        ids = self.sample(batch)
        rewards = (ids[:, start:] < VOCABULARY // 2).float().mean(1)
        grouped = rewards.view(-1, self.group)
        advantages = (grouped - grouped.mean(1, keepdim=True)).flatten()
        texts = [" ".join(map(str, row)) for row in ids[:, start:].tolist()]
        steps = [self.global_step] * len(texts)
        self.samples += zip(steps, texts, rewards.tolist(), advantages.tolist(), strict=True)
        if self.joins:
            tasks = [Task(" ".join(map(str, prompt))) for prompt in batch.tolist()]
            x = build(
                ids[:, :start].tolist(), ids[:, start:].tolist(), [i // self.group for i in range(len(ids))], tasks
            )
            x.rewards, x.texts = rewards, texts
            x.advantages = advantages[:, None] * x.mask
            hooks.call(self.trainer, "on_advantage", x)
        entropies = []
        for _ in range(self.steps):
            logits = self.lm(input_ids=ids).logits
            logps = logits.log_softmax(-1)
            taken = torch.zeros(ids.shape)
            taken[:, start:] = logps[:, start - 1 : -1].gather(-1, ids[:, start:, None]).squeeze(-1)
            first = start - 1 if self.joins else 0
            last = -1 if self.joins else None
            entropies += [entropy(x) for row in logits.detach()[:, first:last] for x in row]
            weights = torch.zeros(ids.shape)
            weights[:, start:] = 1 / ids[:, start:].numel()
            loss = -advantages[:, None] * taken
            if self.joins:
                spread = torch.zeros(ids.shape)
                spread[:, start:] = -(logps.exp() * logps).sum(-1)[:, start - 1 : -1]
                hooks.call(self.trainer, "on_loss", x, Terms(taken, spread, loss, weights))
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward((loss * weights).sum())
            optimizer.step()
        self.seen.append(entropies)

    def validation_step(self, batch, batch_idx):
        self.lm(input_ids=batch["input_ids"])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.lm.parameters(), lr=1e-2)


class Joined(Manual):
    joins = True


def prompts():
    return DataLoader(torch.randint(1, VOCABULARY, (6, 5), generator=torch.Generator().manual_seed(3)), batch_size=2)


@pytest.mark.parametrize("kind", [Manual, Joined])
def test_entropy_of_somebodys_grpo(kind):
    """Of all tokens of the training forwards; of the response's tokens when the module tells which they are."""
    module = kind()
    assert logged(module, prompts(), max_epochs=1, limit_val_batches=1, val_check_interval=1) == means(module.seen)
    assert len(module.seen) == 3
    assert len(module.seen[0]) == 2 * 6 * (4 if kind.joins else 9)


def test_completions_of_somebodys_grpo():
    module = Joined()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Completions")
        logged(module, prompts(), max_epochs=1, callbacks=[Completions()])
    records = jsonl.read(Path("run/completions.jsonl"))
    assert [(r["step"], r["response"], r["reward"]) for r in records] == [sample[:3] for sample in module.samples]
    assert [r["advantage"] for r in records] == pytest.approx([sample[3] for sample in module.samples], abs=1e-6)
    assert {r["step"] for r in records} == {0, 2, 4}
    want = [" ".join(map(str, prompt)) for batch in prompts() for prompt in batch.tolist()]
    assert [r["prompt"] for r in records] == [prompt for prompt in want for _ in range(3)]
    assert {(r["correct"], r["tokens"], r["mean_logp"]) for r in records} == {(None, 4, None)}


@pytest.mark.parametrize("kind", [Manual, FineTuning])
def test_completions_tell_a_module_that_does_not_join(kind):
    message = (
        rf"Completions has nothing to record: in its first step {kind.__name__} has not called the hook on_advantage"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        logged(kind(), prompts() if kind is Manual else None, callbacks=[Completions()])
    assert len([w for w in caught if "Completions" in str(w.message)]) == 1
    assert not Path("run/completions.jsonl").exists()


def test_completions_tell_of_sft():
    with pytest.warns(UserWarning, match="SFT has not called the hook on_advantage. SFT samples no responses"):
        trainer(max_steps=1, callbacks=[Completions()]).fit(policy(SFT), Letters(n=8))
