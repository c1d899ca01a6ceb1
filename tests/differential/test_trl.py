"""Loss and full gradient of lit-rl are those of TRL 1.16's GRPOTrainer, for all of its loss types.

Where the two differ by definition, the test says how and makes up for it by name:
- TRL adds 1e-4 to a standard deviation, lit-rl (as verl) 1e-6: `same` sets 1e-4;
- TRL's luspo is Dr. GRPO's sum over tokens without the division by the constant length: `LOSSES` has the factor;
- what is a mean over what in bnpo and dapo, rows that do not count, entropy and KL: each has a test of its own below.
Not compared, since lit-rl has no such thing: masks by entropy or by divergence, the adaptive entropy bonus, several
rewards normalised one by one, a reference that moves. Of the options that vLLM alone has, importance sampling is.
"""

import gc
from functools import partial

import pytest
import torch
from both_sides import GROUP, MAX_TOKENS, Row, Step, make
from lit_side import Record, lit
from trl_side import trl

from lit_rl import RLCallback, objectives
from lit_rl.advantage import ADVANTAGES, grpo, lite_ppo

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:You are using 'rollout_func':UserWarning")

LOSSES = {  # TRL's loss_type -> lit-rl's settings, and TRL's loss in units of lit-rl's
    "grpo": (dict(objective="ppo", aggregate="sequence"), 1),
    "bnpo": (dict(objective="ppo", aggregate="token"), 1),
    "dapo": (dict(objective="ppo", aggregate="token"), 1),
    "dr_grpo": (dict(objective="ppo", aggregate="constant"), 1),
    "luspo": (dict(objective="ppo", aggregate="constant"), MAX_TOKENS),
    "cispo": (dict(objective="cispo", aggregate="token", cap=1.5), 1),
    "sapo": (dict(objective="sapo", aggregate="sequence"), 1),
    "vespo": (dict(objective="vespo", aggregate="token"), 1),
}
CLIP = {"cispo": dict(epsilon_high=1.5)}  # there it is the cap
SCALES = {"group": "grpo", "batch": "lite_ppo", "none": "dr_grpo"}
AWAY = {  # how far the policy is from the one that sampled
    "on-policy": dict(iterations=1),
    "stale": dict(iterations=2, length=0.03),
    "clipped": dict(iterations=2, length=0.15),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    rows = make(folder)
    trl(folder, rows)  # imports
    gc.collect()
    gc.freeze()  # each of TRL's runs collects garbage, in seconds when everything imported counts
    yield folder, rows
    gc.unfreeze()


@pytest.fixture
def same(made, monkeypatch):
    """Runs both sides: the settings by name are TRL's, those in `ours` lit-rl's. Returns lit-rl's record."""
    folder, rows = made
    for name, function in (("grpo", grpo), ("lite_ppo", lite_ppo)):
        monkeypatch.setitem(ADVANTAGES, name, partial(function, eps=1e-4))

    def run(
        loss_type: str, ours: dict, rows: list[Row] = rows, scale: float = 1, iterations: int = 1, length=0.1, **theirs
    ) -> Record:
        settings, factor = LOSSES[loss_type]
        clip = CLIP.get(loss_type, dict(epsilon_high=0.28))
        steps = dict(num_iterations=iterations, steps=iterations, length=length)
        want, _ = trl(folder, rows, loss_type=loss_type, **{**clip, **steps, **theirs})
        got = lit(folder, rows, length=length, **{**settings, "epochs": iterations, "clip_high": 0.28, **ours})
        # what float32 rounds in packed attention, a ratio of whole sequences adds up over their tokens
        mode = theirs.get("vllm", {}).get("vllm_importance_sampling_mode", "")
        whole = loss_type == "vespo" or mode.startswith("sequence")
        assert_same(got.steps, want, scale * factor, 5e-6 if whole else 1e-6)
        return got

    return run


def assert_same(got: list[Step], want: list[Step], scale: float = 1, loss: float = 1e-6) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert abs(scale * ours.loss - theirs.loss) < loss * scale * ours.size
        assert 0 < (scale * ours.gradient - theirs.gradient).norm() < 5e-6 * theirs.gradient.norm()


class OnLoss(RLCallback):
    """What makes up for a difference in the loss."""

    def __init__(self, change) -> None:
        self.change = change

    def on_loss(self, trainer, policy, x, terms) -> None:
        self.change(policy, x, terms)


# ------------------------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("away", AWAY)
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses(same, loss_type, level, beta, away):
    ours = dict(ratio=level, kl_coef=beta)
    record = same(loss_type, ours, importance_sampling_level=level, beta=beta, **AWAY[away])
    if away == "clipped" and LOSSES[loss_type][0]["objective"] == "ppo":
        assert min(record.clipped.count(1.0), record.clipped.count(-1.0)) > 5
    if away == "clipped" and loss_type == "cispo":
        assert record.clipped.count(1.0) > 5


@pytest.mark.parametrize("scale_rewards", ["batch", "none"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_scales_of_the_advantage(same, loss_type, scale_rewards):
    same(loss_type, dict(advantage=SCALES[scale_rewards]), scale_rewards=scale_rewards, **AWAY["stale"])


@pytest.mark.parametrize("loss_type", [name for name in LOSSES if name != "bnpo"])
def test_gradient_accumulation(same, made, loss_type):
    halves = dict(per_device_train_batch_size=len(made[1]) // 2, gradient_accumulation_steps=2)
    same(loss_type, dict(microbatch_tokens=30), **halves, **AWAY["stale"])


def test_two_sided_clip(same):
    record = same("dapo", dict(dual_clip=1.3, clip_high=0.2), epsilon_high=0.2, delta=1.3, iterations=2, length=1.0)
    single = same("dapo", dict(clip_high=0.2), epsilon_high=0.2, iterations=2, length=1.0)
    assert record.clipped.count(-1.0) > single.clipped.count(-1.0)


# --------------------------------------------------------------------------------- importance sampling of the engine

MODES = [(level, mode, low) for level in ("token", "sequence") for mode in ("truncate", "mask") for low in (None, 0.75)]


@pytest.mark.parametrize(("level", "mode", "low"), MODES)
def test_importance_sampling(same, level, mode, low):
    theirs = dict(
        vllm_importance_sampling_mode=f"{level}_{mode}",
        vllm_importance_sampling_clip_max=1.25,
        vllm_importance_sampling_clip_min=low,
    )
    seen = []

    def correct(policy, x, terms):
        old = terms.logps.detach() if x.logps is None else x.logps
        weight = objectives.truncated_importance(old, x.sampler_logps, x.mask, level, 1.25, low, mode)
        terms.loss = terms.loss * weight
        seen.extend(weight[x.mask].tolist())

    same("grpo", dict(callbacks=[OnLoss(correct)]), vllm=theirs, **AWAY["stale"])
    assert 10 < sum(w in (0.0, 1.25, low) for w in seen) < len(seen) - 10


@pytest.mark.parametrize("away", AWAY)
def test_truncated_importance_sampling_is_an_option(same, away):
    theirs = dict(vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=1.5)
    same("dapo", dict(tis_cap=1.5, kl_coef=0.1), vllm=theirs, beta=0.1, **AWAY[away])


def test_vespo_takes_the_ratio_against_the_engine(same):
    """TRL folds the correction into the ratio of the sequence. Uncut, that is the ratio to what the engine reported."""
    theirs = dict(vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=1e6)
    same("vespo", dict(old_logps="sampler"), vllm=theirs, **AWAY["stale"])


# ------------------------------------------------------------------------------------------- different by definition


@pytest.mark.parametrize(("scale_rewards", "name"), [("group", "grpo"), ("batch", "lite_ppo")])
def test_what_is_added_to_the_standard_deviation(made, scale_rewards, name):
    folder, rows = made
    (inputs,) = trl(folder, rows, scale_rewards=scale_rewards)[1]
    rewards = torch.tensor([row.reward for row in rows])
    group = torch.arange(len(rows)) // GROUP
    ours = ADVANTAGES[name](rewards, group, torch.ones(len(rows), 1))[:, 0]
    std = rewards.view(-1, GROUP).std(1)[group] if name == "grpo" else rewards.std()
    want = torch.tensor([float(by_text(inputs, rows, "advantages")[row.text]) for row in rows])
    torch.testing.assert_close(ours * (std + 1e-6) / (std + 1e-4), want, rtol=1e-6, atol=1e-6)
    assert (ours - want).abs().max() > 1e-5


def by_text(inputs: dict, rows: list[Row], key: str) -> dict:
    """TRL shuffles rows: their entries of one input, by response."""
    texts = {tuple(row.ids): row.text for row in rows}
    ids = [c[m.bool()].tolist() for c, m in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)]
    return {texts[tuple(i)]: value for i, value in zip(ids, inputs[key], strict=True)}


@pytest.mark.parametrize(("loss_type", "accumulation"), [("bnpo", 2), ("dapo", 1)])
def test_token_means_over_parts_of_a_batch(made, monkeypatch, loss_type, accumulation):
    """A token's weight is one in lit-rl's minibatch, however that is cut. In TRL,
    - bnpo is a mean over each micro-batch, then over those: a token of one with few tokens counts for more;
    - dapo divides a minibatch by its expected number of tokens, an equal share of those generated, not by its own.
    """
    folder, rows = made
    monkeypatch.setitem(ADVANTAGES, "grpo", partial(grpo, eps=1e-4))
    parts = dict(steps_per_generation=2, gradient_accumulation_steps=accumulation)
    steps, inputs = trl(folder, rows, loss_type=loss_type, per_device_train_batch_size=len(rows) // 2, **parts)
    tokens = [int(part["completion_mask"].sum()) for part in inputs]
    assert tokens[0] * 2 != sum(len(row.ids) for row in rows)
    weight = {}
    for part, count in zip(inputs, tokens, strict=True):
        divisor = 2 * count if loss_type == "bnpo" else sum(len(row.ids) for row in rows) / 2
        weight |= dict.fromkeys(by_text(part, rows, "advantages"), 1 / divisor)

    def weigh(policy, x, terms):
        terms.weights = torch.tensor([weight.get(text, 0.0) for text in x.texts])[:, None] * x.mask

    assert_same(lit(folder, rows, aggregate="token", callbacks=[OnLoss(weigh)]).steps, steps)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_truncated_rows(same, made, loss_type):
    """Masked, they still count as rows in TRL's mean over rows; in lit-rl they do not. A mean over tokens is the same."""
    left = sum(row.finished for row in made[1]) / len(made[1])
    scale = left if loss_type == "grpo" else 1
    same(loss_type, dict(mask_truncated=True), scale=scale, mask_truncated_completions=True, **AWAY["on-policy"])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_rows_without_a_reward(same, made, loss_type):
    """They are in no baseline. In TRL they count in the mean with an advantage of zero, in lit-rl not at all."""
    rows = [Row(**{**vars(row), "reward": None if i in (5, 8) else row.reward}) for i, row in enumerate(made[1])]
    size = (lambda row: 1) if loss_type == "grpo" else (lambda row: len(row.ids))
    share = sum(size(row) for row in rows if row.reward is not None) / sum(size(row) for row in rows)
    same(loss_type, {}, rows=rows, scale=share, **AWAY["on-policy"])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_entropy_bonus(same, made, loss_type):
    """TRL's is a mean over tokens in every loss; lit-rl's goes with the loss, here a mean over rows for grpo."""
    tokens = sum(len(row.ids) for row in made[1])

    def over_tokens(policy, x, terms):
        terms.loss = terms.loss + 0.1 * terms.entropy * (1 - x.mask / tokens / terms.weights.clamp(min=1e-9))

    make_up = [OnLoss(over_tokens)] if loss_type == "grpo" else []
    same(loss_type, dict(entropy_coef=0.1, callbacks=make_up), entropy_coef=0.1, **AWAY["stale"])


def test_divergence_is_capped(same):
    """k3 is at most 10 at a token in lit-rl, as in verl, without limit in TRL."""
    capped = []

    def uncap(policy, x, terms):
        d = (x.ref_logps - terms.logps) * x.mask
        k3 = d.exp() - d - 1
        capped.append(int((k3 > 10).sum()))
        terms.loss = terms.loss + policy.kl_coef * torch.where(k3 > 10, k3 - 10, 0.0)

    same("grpo", dict(kl_coef=0.1, callbacks=[OnLoss(uncap)]), beta=0.1, iterations=2, length=2.0)
    assert capped[-1] > 0


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_divergence_times_ratio(same, level):
    """TRL's default multiplies k3 by the ratio, which makes its gradient unbiased; lit-rl's "k3+" is another way to that."""

    def times_ratio(policy, x, terms):
        old = terms.logps.detach() if x.logps is None else x.logps
        log_ratio = (terms.logps - old) * x.mask
        if level == "sequence":
            log_ratio = log_ratio.sum(1, keepdim=True) / x.mask.sum(1, keepdim=True)
        k3 = objectives.kl(terms.logps, x.ref_logps, x.mask)
        terms.loss = terms.loss + policy.kl_coef * k3 * (log_ratio.exp() - 1)

    ours = dict(kl_coef=0.1, ratio=level, callbacks=[OnLoss(times_ratio)])
    theirs = dict(beta=0.1, importance_sampling_level=level, use_bias_correction_kl=True)
    same("grpo", ours, **theirs, **AWAY["clipped"])
