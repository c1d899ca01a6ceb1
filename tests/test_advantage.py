"""The degenerate cases of every advantage, and what must hold for any rewards; tests/test_vectors.py has the values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_rl.advantage import ADVANTAGES


def tensor(values: list | float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_close(actual: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, groups that need not be adjacent, masks of which some rows may be empty."""
    n, t = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    rewards = draw(st.lists(st.floats(-2, 2), min_size=n, max_size=n))
    group = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    lengths = torch.tensor(draw(st.lists(st.integers(0, t), min_size=n, max_size=n)))
    return tensor(rewards), torch.tensor(group), torch.arange(t) < lengths[:, None]


every = pytest.mark.parametrize("name", ADVANTAGES)
quick = settings(max_examples=40, deadline=None)


@every
@quick
@given(batches(), st.data())
def test_order_and_names_of_groups_do_not_matter(name: str, batch: tuple, data: st.DataObject) -> None:
    rewards, group, mask = batch
    order = torch.tensor(data.draw(st.permutations(range(len(rewards)))))
    expected = ADVANTAGES[name](rewards, group, mask)[order]
    actual = ADVANTAGES[name](rewards[order], 7 * (3 - group[order]), mask[order])
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
@quick
@given(batches(), st.floats(-5, 5))
def test_shifted_rewards_give_the_same_advantages(name: str, batch: tuple, shift: float) -> None:
    rewards, group, mask = batch
    rewards = rewards.round(decimals=3)  # a spread near the float noise that shifting makes has no stable direction
    group = torch.cat([group, group])  # no group of one: its advantage is its reward
    rewards, mask = torch.cat([rewards, 1 - rewards]), torch.cat([mask, mask])
    expected = ADVANTAGES[name](rewards, group, mask)
    assert_close(ADVANTAGES[name](rewards + shift, group, mask), expected)


@every
@quick
@given(batches(), st.data())
def test_an_invalid_row_might_as_well_not_be_there(name: str, batch: tuple, data: st.DataObject) -> None:
    rewards, group, mask = batch
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(rewards), max_size=len(rewards))))
    expected = torch.zeros(mask.shape, dtype=rewards.dtype)
    expected[valid] = ADVANTAGES[name](rewards[valid], group[valid], mask[valid])
    assert_close(ADVANTAGES[name](rewards, group, mask, valid), expected)
    unknown = torch.where(valid, rewards, torch.nan)
    assert_close(ADVANTAGES[name](unknown, group, mask), expected)


@every
@quick
@given(st.floats(-10, 10, width=32), st.integers(2, 30), st.sampled_from([torch.float32, torch.float64]))
def test_equal_rewards_are_exactly_zero(name: str, reward: float, n: int, dtype: torch.dtype) -> None:
    mask = torch.arange(7) <= (torch.arange(n) % 7)[:, None]
    assert not ADVANTAGES[name](torch.full((n,), reward, dtype=dtype), torch.zeros(n).long(), mask).any()


@every
def test_nothing_valid_or_no_tokens_is_zero(name: str) -> None:
    rewards, group = tensor([1.0, 0.0, torch.nan]), torch.tensor([0, 0, 1])
    mask = torch.ones(3, 2, dtype=torch.bool)
    assert not ADVANTAGES[name](rewards, group, mask, torch.zeros(3, dtype=torch.bool)).any()
    assert not ADVANTAGES[name](rewards, group, torch.zeros_like(mask)).any()
    assert ADVANTAGES[name](rewards[:0], group[:0], mask[:0]).shape == (0, 2)


def test_a_group_of_one_keeps_its_reward() -> None:
    rewards, group, mask = tensor([3.0, 1.0, 0.0]), torch.tensor([5, 2, 2]), torch.ones(3, 1)
    for name in ("dr_grpo", "rloo", "opo"):
        assert ADVANTAGES[name](rewards, group, mask)[0, 0] == 3.0
    assert ADVANTAGES["grpo"](rewards, group, mask)[0, 0] == 3.0 / (1 + 1e-6)


def test_rloo_is_the_mean_of_the_others() -> None:
    rewards, group, mask = tensor([1.0, 0.0, 0.5, 9.0, 7.0]), torch.tensor([0, 0, 0, 1, 1]), torch.ones(5, 1)
    expected = tensor([1 - 0.25, 0 - 0.75, 0.5 - 0.5, 2.0, -2.0])
    assert_close(ADVANTAGES["rloo"](rewards, group, mask)[:, 0], expected)


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_whitened_over_tokens(name: str) -> None:
    rewards, group, mask = tensor([1.0, 0.0, 0.5, 9.0, 7.0]), torch.tensor([0, 0, 0, 1, 1]), torch.ones(5, 4).bool()
    mask[1, 2:] = False
    tokens = ADVANTAGES[name](rewards, group, mask)[mask]
    assert_close(tokens.mean(), tensor(0.0))
    assert_close(tokens.std(), tensor(1.0))


def test_lite_ppo_divides_by_the_deviation_of_the_batch() -> None:
    rewards, group, mask = (
        tensor([1.0, 0.0, 0.5, 9.0, 7.0, torch.nan]),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.ones(6, 1),
    )
    expected = tensor([0.5, -0.5, 0.0, 1.0, -1.0, 0.0]) / (rewards[:5].std() + 1e-6)
    assert_close(ADVANTAGES["lite_ppo"](rewards, group, mask)[:, 0], expected)
