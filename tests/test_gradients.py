"""The gradient is a function of the batch: not of how it is split, ordered, loaded or resumed. And equal seeds, equal bits."""

import copy
import tempfile

import pytest
import torch
from test_policy import Gradients, Letters, trainer, weights
from test_resume import INNER, every_callback, judge, policy
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lit_rl import GRPO, SFT, RLCallback, Sampling, Task
from lit_rl.cli import CALLBACKS, METHODS
from lit_rl.datamodules import Vowels
from lit_rl.datamodules.base import TaskData


class Groups(TaskData):
    """Four prompts of different lengths, in some order."""

    def __init__(self, order=(0, 1, 2, 3)):
        super().__init__(4)
        self.order = order

    def tasks(self, split):
        return [
            Task(f"{i}: " + "ab" * 3 * i, judge, ["yes" * (i + 1), "no"], [1.0, 0.0], id=str(i)) for i in self.order
        ]


class Recorder(Gradients):
    """And into how many slices a policy's minibatch was cut at most."""

    def __init__(self):
        super().__init__()
        self.slices = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        super().on_before_optimizer_step(trainer, module, optimizer)
        self.slices.append(max(len(slices) for _, slices in module._by_policy(module._minibatch)))


def gradients(method, precision, data=None, callbacks=(), **settings):
    """In one Trainer step with plain gradient descent: Adam's first steps would blow rounding up."""
    module = policy(method, **settings)
    module.dynamic_sampling = False
    module.configure_optimizers = lambda: torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.01)
    recorder = Recorder()
    folder = tempfile.mkdtemp(dir=".")
    run = trainer(max_steps=1, precision=precision, default_root_dir=folder, callbacks=[*callbacks, recorder])
    run.fit(module, data or Groups())
    return recorder


def errors(got, want):
    """Relative, of each optimizer step."""
    assert want.seen[0].norm() > 0  # later, a clip may leave none
    return [float((a - b).norm() / b.norm().clamp(min=1e-9)) for a, b in zip(got.seen, want.seen, strict=True)]


@pytest.fixture
def exact(monkeypatch):
    """In float64 all of the model is float64: transformers' norm rounds to float32."""
    norm = lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)  # noqa: E731
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)


@pytest.mark.parametrize("inner", INNER, ids=["1x1", "2x3"])
@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_of_every_method(name, inner, exact):
    """Float64 shows that the formula is exact, float32 what rounding leaves: the sum over a slice's tokens and the sum over
    slices add the same numbers in another order. After the first step the weights differ by that too."""
    for precision, first, later in (("64-true", 1e-12, 1e-12), ("32-true", 1e-6, 1e-5)):
        whole = gradients(METHODS[name], precision, **inner)
        assert len(whole.seen) == inner["epochs"] * inner["minibatches"]
        for tokens in (1, 30):  # a row at a time, a few
            split = gradients(METHODS[name], precision, microbatch_tokens=tokens, **inner)
            assert max(split.slices) > max(whole.slices) == 1
            found = errors(split, whole)
            assert found[0] < first, (precision, tokens)
            assert max(found) < later, (precision, tokens)
    order = (3, 1, 0, 2) if inner["minibatches"] == 1 else (1, 0, 2, 3)  # groups stay in their minibatches
    assert max(errors(gradients(METHODS[name], "32-true", Groups(order), **inner), whole)) < later


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_gradient_with_every_callback(name, exact):
    def callbacks():
        return every_callback(policy(GRPO), Groups(), {name: CALLBACKS[name]})

    if not callbacks():
        pytest.skip(f"{name} needs arguments")
    inner = INNER[1]
    whole = gradients(GRPO, "64-true", callbacks=callbacks(), **inner)
    for tokens in (1, 30):
        split = gradients(GRPO, "64-true", callbacks=callbacks(), microbatch_tokens=tokens, **inner)
        assert max(split.slices) > max(whole.slices) == 1
        assert max(errors(split, whole)) < 1e-12


def test_sft_gradient_is_the_mean_over_all_response_tokens():
    recorder = Gradients()
    module = SFT("tiny", lr=1e-3, sampling=Sampling(max_new_tokens=6), microbatch_tokens=100)
    reference = copy.deepcopy(module.model)
    trainer(max_steps=1, callbacks=[recorder]).fit(module, Letters(batch_size=3))
    losses, count = [], 0
    for task in Letters().tasks("train")[:3]:
        for response in task.responses:
            prompt = module.tokenizer(task.prompt + "\n")["input_ids"]
            answer = [*module.tokenizer(response)["input_ids"], module.tokenizer.eos_token_id]
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            losses.append(reference(ids, labels=labels).loss * len(answer))
            count += len(answer)
    (sum(losses) / count).backward()
    want = torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert (recorder.seen[0] - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.3])
@pytest.mark.parametrize(
    "cut", [dict(), dict(top_p=0.8), dict(top_k=7), dict(min_p=0.3), dict(top_p=0.9, top_k=20, min_p=0.1)]
)
def test_on_policy_the_ratio_is_one(cut, temperature):
    class Watch(RLCallback):
        worst = kept = 0.0

        def on_loss(self, trainer, module, x, terms):
            assert (terms.logps[x.mask] <= 1e-5).all()
            self.worst = max(self.worst, float((terms.log_ratio.exp() - 1).abs().max()))
            self.kept = 0.0 if x.log_kept is None else float(x.log_kept.min())

    watch = Watch()
    module = policy(GRPO, old_logps="sampler")
    module.sampling = Sampling(max_new_tokens=12, temperature=temperature, **cut)
    trainer(callbacks=[watch], max_steps=1).fit(module, Groups())
    assert 0 < watch.worst < 1e-5
    assert (watch.kept < -0.01) == bool(cut), "nothing was cut off"


def test_same_seed_same_bits_and_another_seed_other_ones():
    runs = []
    for seed in (0, 0, 1):
        module = policy(GRPO)
        module.seed = seed
        trainer(max_steps=3).fit(module, Letters())
        runs.append(weights(module))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_workers_of_the_loader_change_nothing():
    class Others(Vowels):
        def train_dataloader(self):
            return DataLoader(self.tasks("train"), batch_size=4, num_workers=workers, collate_fn=list)

    runs = []
    for workers in (None, 0, 2):
        module = policy(GRPO)
        data = Vowels(size=16, batch_size=4) if workers is None else Others(size=16)
        trainer(max_steps=4).fit(module, data)
        runs.append(weights(module))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])
