"""The answer grammar: lenient about dress, strict about content."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_rl.datamodules.families.answers import (
    AnswerError,
    Grid,
    Integer,
    Integers,
    Rational,
    Text,
    Words,
    extract,
    wrap,
)


@pytest.mark.parametrize(
    "dressed",
    [
        "12",
        " 12 ",
        "**12**",
        "$12$",
        "`12`",
        "\\boxed{12}",
        "12.",
        "**12.**",
        "```\n12\n```",
        "\\(12\\)",
        "$\\boxed{12}$.",
    ],
)
def test_dress_is_taken_off(dressed):
    assert Integer().parse(extract(f"thinking <answer>{dressed}</answer> bye")) == 12


@pytest.mark.parametrize(
    "text",
    [
        "12",
        "<answer>12",
        "12</answer>",
        "</answer>12<answer>",
        "<think>the <answer>12</answer>",
        "<think><answer>12</answer></think> no block",
    ],
)
def test_without_a_block_after_the_thinking_there_is_no_answer(text):
    with pytest.raises(AnswerError):
        extract(text)


def test_the_last_block_counts():
    assert extract("<answer>1</answer> no, <answer>2</answer>") == "2"
    assert extract("<think><answer>1</answer></think><answer>2</answer>") == "2"


@pytest.mark.parametrize("text", ["1 2", "12a", "0x1f", "1e3", "", "1.0", "١٢", "1,2", "9" * 2000, "--1", "1 or 2"])
def test_not_an_integer(text):
    with pytest.raises(AnswerError):
        Integer().parse(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6/8", "3/4"),
        ("-0.50", "-1/2"),
        ("3", "3"),
        ("\\frac{2}{4}", "1/2"),
        ("4/2", "2"),
        (".5", "1/2"),
        ("-.25", "-1/4"),
    ],
)
def test_rationals(text, value):
    assert Rational().parse(text) == value


@pytest.mark.parametrize("text", ["1/0", "1/2/3", "a/b", "0." + "1" * 2000, "1.2.3"])
def test_not_a_rational(text):
    with pytest.raises(AnswerError):
        Rational().parse(text)


@given(st.lists(st.integers(-999, 999), max_size=8))
def test_integer_lists_round_trip(value):
    assert Integers().parse(Integers().render(value)) == value
    assert Integers().parse(str(value)) == value
    assert Integers().parse(", ".join(map(str, value))) == value


@given(st.lists(st.lists(st.sampled_from("abc12"), min_size=2, max_size=4), min_size=2, max_size=4))
def test_grids_round_trip(value):
    grid = Grid()
    assert grid.parse(grid.render(value)) == value
    assert grid.parse("\n".join("".join(row) for row in value)) == value
    assert grid.parse("\n".join(" ".join(row) for row in value)) == value
    assert grid.parse(str(value)) == value


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text):
    for kind in (Integer(), Rational(), Text(), Integers(), Words(), Grid()):
        try:
            value = kind.parse(text)
        except AnswerError:
            continue
        assert kind.parse(kind.render(value)) == value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Integer(), 7),
        (Rational(), "3/4"),
        (Text(), "abca"),
        (Integers(), [3, 1, 2]),
        (Words(), ["a", "b", "c"]),
        (Grid(), [["1", "2"], ["3", "4"]]),
    ],
)
def test_near_misses_differ(kind, value):
    misses = list(kind.near_misses(value, Random(0)))
    assert len(misses) >= 12
    assert value not in misses


def test_wrap():
    assert extract(wrap("x")) == "x"
