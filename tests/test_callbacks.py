"""Callbacks on lit-rl's policies and on a stranger's module."""

import json
import re
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import transformers
from test_policy import Letters, policy, trainer

from lit_rl import SFT, RLCallback, Sampling, hooks
from lit_rl.callbacks import Completions, EntropyMonitor, RolloutStats
from lit_rl.callbacks.rollout_stats import over_ranks
from lit_rl.rollout import Rollout


class Stranger(L.LightningModule):
    """Somebody's own fine-tuning module, written without lit-rl."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        self.lm = transformers.LlamaForCausalLM(config)
        self.seen = []

    def training_step(self, batch, batch_idx):
        ids = batch
        labels = ids.clone()
        labels[:, :3] = -100
        with torch.no_grad():
            self.lm(input_ids=ids)  # some other forward
        out = self.lm(input_ids=ids, labels=labels)
        p = out.logits[:, 2:-1].softmax(-1)
        self.seen.append(float(-(p * p.log()).sum(-1).mean()))
        return out.loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Log(L.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def test_entropy_of_a_strangers_module():
    log, module = Log(), Stranger()
    loader = torch.utils.data.DataLoader(torch.randint(30, (6, 8)), batch_size=2)
    trainer(max_steps=3, callbacks=[EntropyMonitor(), log]).fit(module, loader)
    assert [r["entropy"] for r in log.rows] == pytest.approx(module.seen, rel=1e-5)
    assert not module.lm._forward_hooks


def test_entropy_needs_a_language_model():
    class Other(Stranger):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.lm = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="found no Hugging Face causal language model in Other"):
        trainer(callbacks=[EntropyMonitor()]).fit(Other(), torch.utils.data.DataLoader(torch.zeros(2, 2)))


def test_entropy_of_a_policy_is_that_of_its_response_tokens():
    class Watch(RLCallback):
        want = 0.0

        def on_loss(self, trainer, module, x, terms):
            logits = module.model(x.tokens).logits[:, :-1].log_softmax(-1)
            entropy = -(logits.exp() * logits).sum(-1)
            self.want = float(entropy[x.mask[:, 1:]].mean())

    log, watch = Log(), Watch()
    trainer(max_steps=1, callbacks=[EntropyMonitor(), watch, log]).fit(policy(), Letters())
    assert log.rows[0]["entropy"] == pytest.approx(watch.want, rel=1e-4)


def test_divergence_from_the_reference():
    class Watch(RLCallback):
        seen = []

        def on_loss(self, trainer, module, x, terms):
            new, ref = (m(x.tokens).logits[:, :-1].log_softmax(-1) for m in (module.model, module.reference))
            d = (ref - new).gather(2, x.tokens[:, 1:, None])[..., 0][x.mask[:, 1:]]
            self.seen += (d.exp() - 1 - d).tolist()

    log = Log()
    module = policy(epochs=2, lr=1e-3, kl_coef=0.1)
    trainer(max_steps=1, callbacks=[RolloutStats(), Watch(), log]).fit(module, Letters(batch_size=8))
    assert log.rows[0]["kl"] == pytest.approx(sum(Watch.seen) / len(Watch.seen), rel=1e-3)
    assert log.rows[0]["kl"] > 1e-4


def test_rollout_stats():
    log = Log()
    module = policy(epochs=2, minibatches=2, lr=3e-3)
    trainer(max_steps=1, callbacks=[RolloutStats(), log]).fit(module, Letters(batch_size=8))
    (row,) = log.rows
    assert {
        "groups/no_signal",
        "length/mean",
        "clip_fraction",
        "ratio/p1",
        "ratio/p50",
        "ratio/p99",
        "ess",
        "grad_norm",
        "reward/all",
        "invalid",
        "seconds/generate",
        "seconds/score",
        "seconds/train",
        "tokens_per_second",
        "reward_std",
        "length/truncated",
    } <= row.keys()
    assert row["ratio/p1"] < 1 < row["ratio/p99"]
    assert 0 < row["ess"] <= 1
    assert row["grad_norm"] > 0
    assert row["invalid"] == 0


def test_what_is_a_most_is_the_most_of_all_ranks():
    names = ("length/max", "mismatch/max_ratio", "tokens_per_second", "length/mean")
    assert [over_ranks(name, [1.0, 3.0]) for name in names] == [3.0, 3.0, 4.0, 2.0]


def test_completions_are_appended_and_hold_what_was_trained_on(capsys):
    seen = []

    class Watch(RLCallback):
        def on_advantage(self, trainer, module, x):
            seen.append(x)

    trainer(max_steps=2, callbacks=[Completions(print_every=1), Watch()]).fit(policy(), Letters())
    assert re.search(r"--- step 1, (right|wrong), reward [01].00\ntrain 4: abababab\n>>> ", capsys.readouterr().out)
    records = [json.loads(line) for line in Path("completions.jsonl").read_text().split("\n") if line]
    assert len(records) == sum(map(len, seen)) == 32
    x = seen[1]
    for record, text, reward, row in zip(records[16:], x.texts, x.rewards, range(16), strict=True):
        assert record["step"] == 1
        assert record["response"] == text
        assert record["reward"] == reward
        assert record["advantage"] == pytest.approx(float(x.advantages[row][x.mask[row]].mean()), abs=1e-6)
        assert record["mean_logp"] == pytest.approx(float(x.sampler_logps[row][x.mask[row]].mean()), rel=1e-5)
    with pytest.raises(FileExistsError, match="already holds another run"):
        trainer(max_steps=1, callbacks=[Completions()]).fit(policy(), Letters())


def test_hooks_may_change_rewards_and_add_rows():
    class Demonstrate(RLCallback):
        """Rows of known responses join each group."""

        def on_rollout(self, trainer, module, x):
            x.set_rewards(torch.zeros(len(x)))
            more = module.demonstrations(x.tasks)
            more.verdicts = [x.verdicts[0]] * len(more)
            more.sampler_logps = torch.zeros(more.tokens.shape)
            x.add(more)

    class Watch(RLCallback):
        def on_advantage(self, trainer, module, x):
            assert len(x) == 4 * (4 + 2)
            assert (x.advantages[x.rewards == 1].sum(1) > 0).all()
            self.sizes = [int((x.group == g).sum()) for g in range(4)]

    watch = Watch()
    trainer(max_steps=1, callbacks=[Demonstrate(), watch]).fit(policy(), Letters())
    assert watch.sizes == [6] * 4


def test_a_listener_need_not_be_a_callback_of_ours():
    class Duck(L.Callback):
        calls = 0

        def on_loss(self, trainer, module, x, terms):
            self.calls += 1

    duck = Duck()
    trainer(max_steps=2, callbacks=[duck]).fit(SFT("tiny", sampling=Sampling(max_new_tokens=4)), Letters())
    assert duck.calls == 2
    with pytest.raises(ValueError, match="no hook 'on_los'"):
        hooks.call(trainer(), "on_los")


def test_callbacks_compose_with_each_other():
    log = Log()
    trainer(max_steps=2, callbacks=[EntropyMonitor(), RolloutStats(), Completions(), log]).fit(
        policy(Rollout), Letters()
    )
    assert {"entropy", "reward", "loss", "grad_norm"} <= log.rows[-1].keys()
