"""The checks of reference vectors that belong to a paper's callback or method. tests/test_vectors.py calls them."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from vector_checks import Check, Unanswered, assert_close, guard, reference_weights, tensor

from lit_rl import ranks
from lit_rl.advantage import dr_grpo, grpo
from lit_rl.callbacks import ClipCov, KLCov, MajorityVote, OffPolicyMixing
from lit_rl.callbacks.covariance import Covariance, covariance, penalty
from lit_rl.datamodules.families.answers import AnswerError, Integer
from lit_rl.entropy_law import fit
from lit_rl.experience import Experience, Terms, build
from lit_rl.objectives import log_ratio, nft, ppo, token_weights
from lit_rl.task import Task, Verdict
from lit_rl.voting import collective_vote, vote

# ------------------------------------------------------------------------------------------------ Clip-Cov and KL-Cov


def batch(case: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, log-probs (with gradient), old log-probs and advantages of a case, or of an example by hand."""
    given = case.get("inputs", case)
    names = ("log_prob", "old_log_prob", "advantages") if "inputs" in case else ("log_prob", "old", "adv")
    logps, old, advantages = (tensor(given[name]) for name in names)
    mask = tensor(given["response_mask"]).bool() if "inputs" in case else torch.ones_like(logps, dtype=torch.bool)
    return mask, logps.requires_grad_(), old, advantages


def choose(
    callback: Covariance, mask: Tensor, logps: Tensor, advantages: Tensor, clipped: Tensor, drawn: Tensor
) -> Tensor:
    """(B, T) bool: what the callback treats after the first optimizer step of a batch."""
    c, n = covariance(logps.detach()[mask], advantages[mask])
    callback._updates = 1
    keys = callback.priority(c, clipped[mask], lambda: drawn[mask])
    return torch.zeros_like(mask).masked_scatter(mask, ranks.largest(keys, max(1, int(callback.ratio * n))))


def loss_and_gradient(loss: Tensor, logps: Tensor, expected: dict) -> None:
    assert_close(loss, expected["loss"])
    assert_close(torch.autograd.grad(loss, logps)[0], expected.get("grad_log_prob", expected.get("grad")))


def clip_cov(case: dict, _: str) -> None:
    mask, logps, old, advantages = batch(case)
    p = case.get("params") or dict(clip_cov_ratio=case["ratio"], clip_cov_lb=case["lb"], clip_cov_ub=case["ub"])
    expected, n = case.get("expected_official", case), int(mask.sum())
    clip = p.get("clip_ratio_low", 1.0), p.get("clip_ratio_high", 1.0)
    low, high = p["clip_cov_lb"], p["clip_cov_ub"]
    ratio = log_ratio(logps, old, mask)
    clipped = ppo(ratio, advantages, *clip).clipped
    if "cov" in expected:
        wanted = tensor(expected["cov"])[mask]  # -inf where clipped
        assert torch.equal(wanted == -math.inf, clipped[mask])
        c, _n = covariance(logps.detach()[mask], advantages[mask])
        assert_close(c[~clipped[mask]], wanted[~clipped[mask]], atol=3e-8)  # they divide by n + 1e-8
    drawn = torch.zeros(mask.shape, dtype=torch.float64)
    for row, column in expected["selected"]:  # the authors' random choice
        drawn[row, column] = 1
    selected = choose(ClipCov(p["clip_cov_ratio"], low, high), mask, logps, advantages, clipped, drawn)
    assert selected.nonzero().tolist() == expected["selected"]
    candidates = choose(ClipCov(1.0, low, high), mask, logps, advantages, clipped, drawn)
    assert candidates.nonzero().tolist() == expected["candidates"]
    loss = ppo(ratio, advantages.masked_fill(selected, 0.0), *clip).loss  # as `treat` does
    if p.get("loss_agg_mode", "token-mean") != "token-mean":
        raise Unanswered(p["loss_agg_mode"])
    loss_and_gradient((loss * token_weights(mask.double(), "token")).sum() * n / (n + 1e-8), logps, expected)


def kl_cov(case: dict, _: str) -> None:
    mask, logps, old, advantages = batch(case)
    n, hand = int(mask.sum()), "inputs" not in case
    p = case.get("params") or dict(k_percent=25.0, k_fraction=0.25, ppo_kl_coef=case["beta"])
    if not advantages.any():
        return  # all tie, and the authors choose some; a row without advantage never gets to the callback
    callback = KLCov(p["k_fraction"], p["ppo_kl_coef"])
    selected = choose(callback, mask, logps, advantages, torch.zeros_like(mask), mask)
    loss = ppo(log_ratio(logps, old, mask), advantages, 1.0, math.inf).loss  # as the recipe: no clip
    loss = loss + callback.coef * penalty(logps, old, mask, selected)
    expected = case if hand else case["expected_official"]
    official = p["k_percent"] <= n or hand or torch.equal(logps, old)  # else they take a percentage for a count
    if official and "selected" in expected:
        assert selected.nonzero().tolist() == sorted(expected["selected"])
    if hand:
        c, _n = covariance(logps.detach().flatten(), advantages.flatten())
        assert_close(c, tensor(case["token_cov"]).flatten())
        assert_close(loss, case["per_token_loss"])
    mode = p.get("loss_agg_mode", "token-mean")
    if mode == "token-mean" and official:
        loss_and_gradient((loss * token_weights(mask.double(), "token")).sum() * n / (n + 1e-8), logps, expected)
    elif mode in ("token-mean", "seq-mean-token-mean"):  # the authors' mean over rows is NaN where one is empty
        weights = token_weights(mask.double(), "token" if mode == "token-mean" else "sequence")
        weights = weights if mode == "token-mean" else weights * guard(mask.double())
        loss_and_gradient((loss * weights).sum(), logps, case["expected_verl_0_9_1"])
    else:
        raise Unanswered(mode)


def token_covariance(case: dict, name: str) -> None:
    if name not in ("token_cov", "mean", "cov_population"):
        raise Unanswered("its keys")
    mask = tensor(case["response_mask"]).bool()
    c, _ = covariance(tensor(case["log_prob"])[mask], tensor(case["advantages"])[mask])
    expected = tensor(case["expected"][name])
    if name == "token_cov":
        assert_close(c, expected[mask])
    else:  # mean and cov_population
        assert_close(c.mean(), expected)


def tabular_entropy(case: dict, name: str) -> None:
    """Theorems 1 and 2 at one softmax, each action drawn as often as its probability says."""
    logits, advantages, eta = tensor(case["logits"]), tensor(case["advantage_centered"]), case["eta"]
    draws = (logits.softmax(0) * 10**6).round().long()
    logps = logits.log_softmax(0)
    natural, plain = (
        float(covariance(logps.repeat_interleave(draws), a.repeat_interleave(draws))[0].mean())
        for a in (advantages, logps.exp() * advantages)
    )
    ours = {
        "entropy": float(-(logps.exp() * logps).sum()),
        "cov_logp_A": natural,
        "pred_dH_npg": -eta * natural,
        "actual_dH_npg": -eta * natural,
        "cov_logp_pA": plain,
        "pred_dH_pg": -eta * plain,
        "actual_dH_pg": -eta * plain,
        "cov_logit_change_pg": eta * plain,
    }
    if name not in ours:
        raise Unanswered(name)
    assert ours[name] == pytest.approx(case["expected"][name], rel=5e-3, abs=1e-10)


# ----------------------------------------------------------------------------------------------------- the entropy law


def entropy_law(case: dict, name: str) -> None:
    points = list(zip(case["H"], case["R"], strict=True))
    expected = case["expected"]
    law, prefix = fit(points), fit(points[: expected["prefix_points"]])
    rest = points[expected["prefix_points"] :]
    error = [prefix(h) - r for h, r in rest]
    mean = sum(case["R"]) / len(points)
    squares = sum((law(h) - r) ** 2 for h, r in points)
    ours = {
        "a": law.a,
        "b": law.b,
        "rmse": law.deviation * math.sqrt(1 - 2 / len(points)),
        "r2": 1 - squares / sum((r - mean) ** 2 for _, r in points),
        "ceiling_at_H0": law.ceiling,
        "slope_at_first": -law.a * math.exp(case["H"][0]),
        "prefix_points": prefix.points,
        "prefix_a": prefix.a,
        "prefix_b": prefix.b,
        "prefix_predict_rmse": math.sqrt(sum(e**2 for e in error) / len(error)),
        "prefix_final_abs_err": abs(error[-1]),
    }
    if name not in ours:
        raise Unanswered(name)
    assert ours[name] == pytest.approx(expected[name], abs=1e-9)


# ----------------------------------------------------------------------------------------------------------------- NFT


def nft_loss(
    logps: Tensor, old: Tensor, correct: Tensor, rate: Tensor, how: int, negative: float, epsilon: float
) -> Tensor:
    """The authors' loss a token, from ours."""
    q = rate.clamp(0.02, 0.98)
    weight = {0: torch.ones_like(q), 1: 1 - q, 2: ((1 - q) / q).sqrt()}[how]
    advantages = weight * torch.where(correct > 0, 1.0, -negative * q / (1 - q))
    ratio = log_ratio(logps, old, torch.ones_like(logps))
    return nft(ratio, advantages[:, None].expand_as(logps), rate, epsilon).loss


def nft_case(case: dict, _: str) -> None:
    given, p, expected = {k: tensor(v) for k, v in case["inputs"].items()}, case["params"], case["expected_official"]
    logps, old, mask = given["log_prob"].requires_grad_(), given["old_log_prob"], given["response_mask"]
    correct, rate = given["correct_mask"], given["correct_rate"]
    if p["ratio_type"] != "token":
        raise Unanswered("the ratio of a sequence, whose code fails but for normalize=0")
    if "error" in expected:  # all right or all wrong: they stop, ours gives no gradient
        assert ((rate == 0) | (rate == 1)).all()
        advantages = dr_grpo(correct, torch.zeros(len(mask), dtype=torch.long), mask)
        loss = nft(log_ratio(logps, old, mask), advantages, rate, p["clamp_negative"]).loss
        assert not loss.any()
        assert not torch.autograd.grad(loss.sum(), logps)[0].any()
        return
    loss = nft_loss(logps, old, correct, rate, p["normalize"], p["neg_weight"], p["clamp_negative"])
    assert_close(loss, expected["per_token_or_seq_loss"])
    loss_and_gradient((loss * mask).sum() / 1000, logps, expected)


def nft_by_hand(case: dict, _: str) -> None:
    case = {"log_prob": [[-0.1, -2.0], [-0.5, -1.0]], "correct": [1, 0], "r": 0.25, "eps": 1.0, "normalize": 1, **case}
    logps, correct = tensor(case["log_prob"]).requires_grad_(), tensor(case["correct"])
    rate = torch.full_like(correct, case["r"])
    loss = nft_loss(logps, tensor(case["old"]), correct, rate, case["normalize"], 1.0, case["eps"])
    assert_close(loss, case["per_token"])
    loss_and_gradient(loss.sum() / 1000, logps, case)


def nft_on_policy(case: dict, _: str) -> None:
    """The gradient is minus the advantage: that of Dr. GRPO, or of GRPO with the population's standard deviation."""
    how = {"drgrpo": 1, "grpo_pop": 2}[case["name"]]
    logps, correct = torch.tensor([[-1.0], [-2.0]], dtype=torch.float64, requires_grad=True), tensor([1, 0])
    rate = torch.full_like(correct, case["correct_rate"])
    loss = nft_loss(logps, logps.detach(), correct, rate, how, 1.0, 1.0)
    gradient = torch.autograd.grad(loss.sum() / 1000, logps)[0].flatten()
    assert_close(gradient, [case["positive_token_grad"], case["negative_token_grad"]])
    advantages = case["drgrpo_adv" if how == 1 else "grpo_population_std_adv"]
    assert_close(-1000 * gradient, [advantages["pos"], advantages["neg"]])


# ------------------------------------------------------------------------------------- LUFFY; TTRL and RLCCF's vote


def luffy(case: dict, _: str) -> None:
    p, expected = case["params"], case["expected_official"]
    shaping = re.fullmatch(r"no_reshape|p_div_p_([\d.]+)", p["off_policy_reshape"])
    if not shaping or "off_max_clip" in p or "off_min_clip" in p:
        raise Unanswered(f"{p['off_policy_reshape']} with a clip of it")
    inputs = {key: tensor(value) for key, value in case["inputs"].items()}
    logps, mask, off = inputs["log_prob"].requires_grad_(), inputs["response_mask"], inputs["prefix_mask"].bool()
    if not torch.equal(off, off.any(1, keepdim=True).expand_as(off)):
        raise Unanswered("a demonstration of which the policy writes the end")
    x = build([[]] * len(mask), [[0] * mask.shape[1]] * len(mask), [0] * len(mask), [])
    x.mask, x.off_policy, x.advantages = mask.bool(), off.any(1), inputs["advantages"]
    low, high = (1.0, torch.inf) if p["loss_remove_clip"] else (p["cliprange"], p["cliprange"])
    loss, clipped = ppo(log_ratio(logps, inputs["old_log_prob"], mask), x.advantages, low, high)
    terms = Terms(logps, torch.zeros_like(logps), loss, mask, None, clipped, surrogate=loss)
    callback = OffPolicyMixing(gamma=float(shaping[1]) if shaping[1] else None)
    callback.on_loss(None, None, x, terms)  # type: ignore[arg-type]
    weights = token_weights(mask, "token")
    if p["loss_remove_token_mean"]:
        weights = reference_weights(mask)["luffy/remove_token_mean"]
    loss = (terms.loss * weights).sum()
    assert_close(loss, expected["pg_loss"])
    assert_close(torch.autograd.grad(loss, logps)[0], expected["grad_log_prob"])


def luffy_by_hand(case: dict, _: str) -> None:
    params = {
        "off_policy_reshape": f"p_div_p_{case['gamma']}",
        "loss_remove_token_mean": True,
        "loss_remove_clip": True,
    }
    names = {"log_prob": "log_prob", "old_log_prob": "old", "advantages": "adv", "prefix_mask": "prefix_mask"}
    inputs = {name: case[theirs] for name, theirs in names.items()}
    inputs["response_mask"] = [[1] * len(row) for row in case["log_prob"]]
    expected = {"pg_loss": case["loss"], "grad_log_prob": case["grad"]}
    luffy({"inputs": inputs, "params": params, "expected_official": expected}, "")


def answered(answers: list[str | None], truth: str) -> Experience:
    """A group of responses with these answers."""
    x = build([[0]] * len(answers), [[0]] * len(answers), [0] * len(answers), [Task("")])
    x.verdicts = [Verdict(a == truth, float(a == truth), a) for a in answers]
    return x


def voted(x: Experience, samples: int) -> dict[str, float]:
    """What MajorityVote makes of an experience, in place, and what it logs."""
    logged: dict[str, float] = {}

    class Module:
        def log(self, name: str, value: float, **_: Any) -> None:
            logged[name.removeprefix("vote/")] = value

    callback: Any = MajorityVote(samples)
    callback.on_rollout(None, None, x)
    callback.on_train_batch_end(None, Module(), None, None, 0)
    return logged


def ttrl_answers(case: dict, name: str) -> None:
    expected, truth = case["expected"][name], case["ground_truth"]
    x = answered(case["answers"], truth)
    ballot = vote(case["answers"], x.group.tolist())
    right = [v.correct for v in x.verdicts]
    logged = voted(x, case["n_samples"])
    wins, size = tensor(ballot.wins), case["n_samples"]
    values = {
        "label": ballot.labels[0],
        "rewards_votes": wins,
        "majority_voting_reward": wins.mean(),
        "majority_ratio": logged["majority_ratio"],
        "label_accuracy": logged["label_accuracy"],
        "reward_accuracy": logged["reward_accuracy"],
        "ground_truth_ratio": logged["true_reward"],
        "train_rewards": x.rewards.double(),
        "train_advantages_grpo": grpo(x.rewards.double(), x.group, x.mask).sum(1),
        "post_reward_accuracy": (x.rewards == tensor(right[:size])).double().mean(),
    }
    if name not in values:
        raise Unanswered(name)
    if isinstance(expected, str):
        assert values[name] == expected
    else:
        assert_close(torch.as_tensor(values[name], dtype=torch.float64), expected)


def ttrl_texts(case: dict, _: str) -> None:
    """What the authors' code extracts, in our canonical form: blanks do not vote, and equal numbers are one answer."""

    def canonical(text: str) -> str | None:
        try:
            return Integer().render(Integer().parse(text))
        except AnswerError:
            return text or None

    answers, truth = [canonical(text) for text in case["extracted"]], canonical(case["ground_truth"])
    assert truth is not None
    ballot = vote(answers, [0] * len(answers))
    if case["label"] == "":  # theirs rewards the responses without an answer
        assert ballot.labels[0] in answers
        assert not any(won for won, answer in zip(ballot.wins, answers, strict=True) if answer is None)
        return
    assert ballot.labels[0] == canonical(case["label"])
    assert_close(tensor(ballot.wins), case["rewards"])
    x = answered(answers, truth)
    logged, metrics = voted(x, case["post_first_k"]), case["metrics"]
    assert_close(tensor(logged["reward_accuracy"]), metrics["reward_accuracy"])
    assert_close(tensor(logged["true_reward"]), metrics["ground_truth_ratio"])
    assert_close(tensor(logged["majority_ratio"]), metrics["majority_voting_reward"])  # theirs splits equal answers
    if re.fullmatch(r"[\d.,-]+", case["label"]):  # theirs reads any other label wrongly
        assert logged["label_accuracy"] == metrics["label_accuracy"]
    assert_close(x.rewards.double(), case["rewards"][: case["post_first_k"]])


def self_consistent(case: dict, name: str) -> None:
    """RLCCF: two votes, the second weighted by how much each model agrees with itself in the first."""
    expected, answers = case["expected"][name], list(case["answers"].values())
    model = [m for m, given in enumerate(answers) for _ in given]
    flat, together = [a for given in answers for a in given], [0] * len(model)
    first, ballot = vote(flat, model), collective_vote(answers)
    consistency = [max(first.votes[m].values(), default=0.0) / len(given) for m, given in enumerate(answers)]
    assert collective_vote(answers, self_consistency=False) == vote(flat, together)
    wins = {
        key: [float(w) for w, n in zip(ballot.wins, model, strict=True) if n == m]
        for m, key in enumerate(case["answers"])
    }
    advantages = {
        key: grpo(tensor(won), torch.zeros(len(won)), torch.ones(len(won), 1)).flatten().tolist()
        for key, won in wins.items()
    }
    values: dict[str, Any] = {
        "sc": dict(zip(case["answers"], consistency, strict=True)),
        "votes": ballot.votes[0],
        "pseudo_label": ballot.labels[0],
        "plain_majority_label": vote(flat, together).labels[0],
        "weighted_share_of_label": max(ballot.votes[0].values(), default=0.0) / sum(ballot.votes[0].values()),
        "rewards": wins,
        "grpo_advantages": advantages,
    }
    if name not in values:
        raise Unanswered(name)
    got = values[name]
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        assert all(got[key] == pytest.approx(expected[key], abs=1e-9) for key in expected)
    else:
        assert got == (expected if isinstance(expected, str | None) else pytest.approx(expected, abs=1e-9))


CHECKS: list[tuple[set[str], Check]] = [
    ({"clip_cov_ratio"}, clip_cov),
    ({"clip_cov", "lb", "ub"}, clip_cov),
    ({"k_percent"}, kl_cov),
    ({"kl_cov", "token_cov"}, kl_cov),
    ({"clamp_negative", "neg_weight"}, nft_case),
    ({"nft", "eps"}, nft_by_hand),
    ({"nft_neg_ratio_below_1"}, nft_by_hand),
    ({"positive_token_grad"}, nft_on_policy),
    ({"H", "R"}, entropy_law),
    ({"advantage_centered", "eta"}, tabular_entropy),
    ({"prefix_mask", "off_policy_reshape"}, luffy),
    ({"luffy"}, luffy_by_hand),
    ({"n_votes", "answers"}, ttrl_answers),
    ({"solutions", "extracted"}, ttrl_texts),
    ({"answers", "ground_truth"}, self_consistent),
    ({"log_prob", "advantages", "response_mask"}, token_covariance),  # the last: others have these columns too
]
"""As in vector_checks."""
