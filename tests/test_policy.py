"""The inner loop keeps Lightning's contract and the weights keep theirs."""

import warnings
from itertools import cycle

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_rl import GRPO, NFT, DrGRPO, RLCallback, Sampling, Task, Verdict
from lit_rl.datamodules.base import TaskData
from lit_rl.experience import build
from lit_rl.forward import packed_layout, rows_layout
from lit_rl.methods.dapo import DAPO
from lit_rl.rollout import Rollout
from lit_rl.scoring import Scorer


class Letters(TaskData):
    """Which letter? Half of the alphabet is right, so that groups differ."""

    def __init__(self, n=64, batch_size=4, score=None):
        super().__init__(batch_size)
        self.n, self.score = n, score

    def tasks(self, split):
        score = self.score or (lambda text: float(bool(text) and text[0] < "N"))
        return [Task(f"{split} {i}: " + "ab" * (i % 5), score, [f"<answer>{i}</answer>", "no"]) for i in range(self.n)]


def trainer(**kwargs):
    defaults = dict(
        max_steps=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    return L.Trainer(**{**defaults, **kwargs})


def policy(method=Rollout, **kwargs):
    torch.manual_seed(0)
    return method("tiny", **{"group": 4, "lr": 1e-3, "sampling": Sampling(max_new_tokens=6), **kwargs})


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


class Gradients(L.Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.requires_grad]))


@pytest.mark.parametrize(
    ("device", "dtype", "layout", "slices"),
    [
        ("cuda:0", torch.bfloat16, packed_layout, 1),
        ("cuda:0", torch.bfloat16, rows_layout, 3),
        ("cuda:0", torch.float32, packed_layout, 3),  # there each group has its mask
        ("cpu", torch.float32, packed_layout, 2),
    ],
)
def test_unequal_groups_share_a_slice_on_a_gpu_where_none_is_padded(device, dtype, layout, slices):
    module = policy(microbatch_tokens=1000)
    module.model.to(dtype)
    module._device, module.token_terms._layout = torch.device(device), layout
    prompts = [[1] * n for n in (2, 30, 60, 90) for _ in range(2)]
    x = build(prompts, [[2] * 10] * 8, [0, 0, 1, 1, 2, 2, 3, 3], [])
    parts = module.slices(x, torch.arange(8))
    assert len(parts) == slices
    assert sorted(int(n) for part in parts for n in part.lengths) == sorted(x.lengths.tolist())


@pytest.mark.parametrize(
    ("layout", "limit", "slices"), [(packed_layout, 1000, 1), (packed_layout, 700, 3), (rows_layout, 1000, 8)]
)
def test_a_slice_holds_what_the_model_is_fed(layout, limit, slices):
    module = policy(microbatch_tokens=limit)
    module.token_terms._layout = layout
    x = build([[1] * 500] * 8, [[2] * 60] * 8, [0] * 8, [])
    parts = module.slices(x, torch.arange(8))
    assert len(parts) == slices
    assert all(layout(part).inputs.numel() <= limit for part in parts)
    assert sum(map(len, parts)) == 8


@pytest.mark.parametrize(("device", "sizes"), [("cpu", [2, 2]), ("cuda:0", [4])])
def test_on_a_cpu_a_slice_is_full_at_an_eighth(device, sizes):
    module = policy(microbatch_tokens=1000)
    module.model.to(torch.bfloat16)  # in which a GPU packs without padding
    module._device, module.token_terms._layout = torch.device(device), packed_layout
    x = build([[1] * 60] * 8, [[2] * 10] * 8, [0, 0, 1, 1, 2, 2, 3, 3], [])  # 80 tokens a group
    assert [len(part.group.unique()) for part in module.slices(x, torch.arange(8))] == sizes


def test_accumulate_grad_batches_is_refused():
    with pytest.raises(MisconfigurationException, match=r"accumulate_grad_batches is 2: .*microbatch_tokens"):
        trainer(accumulate_grad_batches=2).fit(policy(), Letters())


def test_batches_must_be_tasks():
    class Numbers(Letters):
        def tasks(self, split):
            return [1, 2, 3, 4]

    for use in (trainer().fit, trainer(limit_val_batches=1).validate):
        with pytest.raises(TypeError, match=r"lists of lit_rl\.Task, not on a list of int"):
            use(policy(), datamodule=Numbers())


def test_without_signal_nothing_moves():
    module = policy(weight_decay=0.1)
    before = weights(module).clone()
    trainer().fit(module, Letters(score=lambda text: 0.0))
    assert torch.equal(before, weights(module))
    assert module.counts["skipped/no_signal"] == 1


def test_a_failing_verifier_is_masked():
    def broken(text):
        raise RuntimeError("boom")

    module = policy()
    before = weights(module).clone()
    with pytest.warns(UserWarning, match="16 responses could not be scored.*RuntimeError: boom"):
        trainer(max_steps=1).fit(module, Letters(score=broken))
    assert torch.equal(before, weights(module))
    assert module.counts["skipped/verifier_failed"] == 16


def test_prompts_that_do_not_fit_are_counted():
    class Long(Letters):
        def tasks(self, split):
            tasks = super().tasks(split)
            tasks[0].prompt = "x" * 3000
            tasks[4].prompt = tasks[5].prompt = "x" * 3001
            return tasks

    module = policy()
    with pytest.warns(
        UserWarning, match="prompts of more than 2042 tokens are left out: the model's context is 2048"
    ) as caught:
        trainer(max_steps=2).fit(module, Long())
    assert sum("left out" in str(w.message) for w in caught) == 1
    assert module.counts["skipped/prompt_too_long"] == 2


def test_responses_that_no_context_holds_are_refused():
    with pytest.raises(ValueError, match=r"max_new_tokens is 2048: it must be below the model's context of 2048"):
        policy(sampling=Sampling(max_new_tokens=2048))


@pytest.mark.parametrize(("score", "told"), [(lambda text: 0.0, True), (lambda text: len(text) / 10, False)])
def test_steps_that_teach_nothing_are_told_of_once(score, told, recwarn):
    warnings.simplefilter("always")
    trainer(max_steps=2).fit(policy(), Letters(score=score))
    assert sum("rewarded alike, and taught nothing" in str(w.message) for w in recwarn) == told


def test_a_step_without_any_prompt_is_survived():
    class Long(Letters):
        def tasks(self, split):
            return [Task("x" * 3000, lambda text: 1.0)] * 8

    module = policy()
    before = weights(module).clone()
    trainer(max_steps=2).fit(module, Long())
    assert torch.equal(before, weights(module))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_batch_whose_only_task_cannot_be_made_is_survived(dynamic):
    class Gap(Letters):
        def tasks(self, split):
            tasks = super().tasks(split)

            class Tasks:
                __len__ = tasks.__len__

                def __getitem__(self, i):
                    return tasks[{1: None}.get(i, i)]

            return Tasks()

    run = trainer(max_steps=3)
    run.fit(policy(dynamic_sampling=dynamic), Gap(batch_size=1))
    assert run.global_step == 3


def test_dynamic_sampling_asks_for_more():
    sizes = []

    class Watch(RLCallback):
        def on_advantage(self, trainer, module, x):
            sizes.append((len(x.tasks), len(x), int((x.advantages.abs().sum(1) > 0).sum())))

    module = policy(DAPO)
    trainer(max_steps=2, callbacks=[Watch()]).fit(module, Letters())
    assert sizes == [(4, 16, 16)] * 2
    assert module.counts["dynamic_sampling/rounds"] >= 1


def test_dynamic_sampling_is_bounded():
    with pytest.raises(RuntimeError, match=r"among 48 responses, 0 of them right \(3 rounds of 4 prompts\)"):
        trainer().fit(policy(DAPO, max_rounds=3), Letters(score=lambda text: 0.0))
    with pytest.raises(RuntimeError, match=r"\(2 rounds of 4 prompts, skipped/verifier_failed 32\)"):
        trainer().fit(policy(DAPO, max_rounds=2), Letters(score=lambda text: None))


def test_dynamic_sampling_stops_when_nothing_is_left_to_learn():
    run = trainer(max_steps=50)
    with pytest.warns(UserWarning, match="all of 160 responses were right"):
        run.fit(policy(DAPO), Letters(score=lambda text: 1.0))
    assert run.global_step == 1


def test_a_verifier_that_fails_now_and_then_says_nothing_of_what_is_left_to_learn():
    fails = cycle([None, 1.0, 1.0])
    with pytest.warns(UserWarning, match="all of 106 responses were right"):
        trainer(max_steps=50).fit(policy(DAPO, scoring=Scorer("inline")), Letters(score=lambda text: next(fails)))


def test_reference_stays_and_the_divergence_starts_at_zero():
    module = policy(GRPO)
    start = weights(module).clone()
    trainer(max_steps=2).fit(module, Letters())
    assert torch.equal(start, torch.cat([p.flatten() for p in module.reference.parameters()]))
    assert not torch.equal(start, weights(module))
    assert not any(p.requires_grad for p in module.reference.parameters())


def test_overlong_and_masked_truncation():
    seen = []

    class Watch(RLCallback):
        def on_advantage(self, trainer, module, x):
            seen.append(x)

    def one(text):
        return 1.0

    module = policy(DrGRPO, overlong_buffer=0.5, mask_truncated=True)
    trainer(max_steps=1, callbacks=[Watch()]).fit(module, Letters(score=one))
    (x,) = seen
    want = 1 + ((3 - x.response_lengths.float()) / 3).clamp(max=0)
    assert torch.allclose(x.rewards, want)
    assert x.truncated.any()
    assert not x.mask[x.truncated].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(cap=0.2), "cap is 0.2: it must be at least 1"),
        (dict(group=0), "group is 0"),
        (dict(group=1, dynamic_sampling=True), "off when group is 1"),
        (dict(advantage="gropo"), "advantage is gropo: it must be one of grpo"),
        (dict(dual_clip=0.5), "dual_clip is 0.5: it must be above 1"),
        (dict(epochs=0), "epochs is 0"),
        (dict(overlong_buffer=4096), "overlong_buffer is 4096: it must be between 0 and 1"),
        (dict(objective="pppo"), "objective is pppo: it must be one of ppo, cispo"),
        (dict(schedule="cos"), "schedule is cos: it must be one of constant, linear"),
        (dict(method=NFT, ratio="sequence"), "ratio is sequence: it must be one of token"),
        (dict(scoring=dict(where="thread")), "where is thread: it must be one of process, inline"),
        (dict(lr=-1.0), "lr is -1.0: it must be at least 0"),
        (dict(sampling=dict(stop="abc")), "sampling.stop is 'abc': it must be a list of texts, none of them empty"),
        (dict(sampling=dict(stop=[""])), "sampling.stop is .*: it must be a list of texts"),
        (
            dict(sampling=Sampling(4096)),
            "sampling.max_new_tokens is 4096: it must be below the model's context of 2048",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        policy(**settings)


def test_options_stay_few():
    from jsonargparse import ArgumentParser

    from lit_rl.cli import METHODS as ALL

    for method in ALL.values():
        parser = ArgumentParser()
        parser.add_class_arguments(method, "m")
        options = [a.dest for a in parser._actions if a.dest.startswith("m.")]
        assert len([name for name in options if not name.endswith(".help")]) <= 60


def test_integer_scores_are_numbers():
    seen = []

    class Watch(RLCallback):
        def on_advantage(self, trainer, module, x):
            seen.append(x.rewards.dtype)

    judge = lambda text: Verdict(len(text) > 3, int(len(text) > 3))  # noqa: E731
    trainer(max_steps=1, callbacks=[Watch()]).fit(policy(GRPO), Letters(score=judge))
    assert seen == [torch.float32]


def test_equal_prompts_get_other_samples():
    """Within a batch, and in the further rounds of dynamic sampling."""

    class Same(Letters):
        def tasks(self, split):
            return [Task("the same prompt", lambda text: 0.0) for _ in range(8)]

    texts = []

    class Watch(RLCallback):
        def on_rollout(self, trainer, module, x):
            texts.extend(x.texts)

    with pytest.raises(RuntimeError, match="no group with different rewards"):
        trainer(max_steps=1, callbacks=[Watch()]).fit(policy(DAPO, max_rounds=3), Same())
    assert len(texts) == 3 * 4 * 4
    assert len(set(texts)) == len(texts)


def test_a_checkpoint_holds_no_objects_and_exports_alone():
    from lit_rl.export import export_checkpoint
    from lit_rl.generation.native import NativeGenerator

    plain = policy()
    module = policy(generator=NativeGenerator(plain.eos, 0, plain.decode, max_rows=8))
    run = trainer(max_steps=1)
    run.fit(module, Letters())
    run.save_checkpoint("run/checkpoints/last.ckpt")
    with pytest.raises(
        FileNotFoundError, match=r"there is no checkpoint run: did you mean run/checkpoints/last.ckpt\?"
    ):
        export_checkpoint("run", "exported")
    export_checkpoint("run/checkpoints/last.ckpt", "exported")
    assert torch.equal(weights(Rollout("exported")), weights(module))


@pytest.mark.parametrize(("products", "exact"), [("highest", True), ("high", False)])
def test_a_samplers_log_probabilities_are_not_exact_where_products_are_rounded_to_tf32(products, exact):
    module = policy()
    torch.set_float32_matmul_precision(products)
    try:
        trainer(max_steps=1).fit(module, Letters(n=8))
        assert module.takes_sampler_logps == exact
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_process_group_of_one_learns_what_a_process_does():
    """From the same tasks: Lightning would put a sampler that shuffles in the place of none."""
    learned = []
    for strategy in ("auto", "ddp"):
        module = policy()
        trainer(strategy=strategy).fit(module, Letters())
        learned.append(weights(module))
    assert torch.equal(*learned)
