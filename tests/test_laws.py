"""Laws of scale: spot values by hand, and a sigmoid that is found again from points with noise."""

import math

import numpy as np
import pytest

from lit_rl.entropy_law import student
from lit_rl.laws import minicpm_batch, sigmoid_fit, step_law


@pytest.mark.parametrize(
    ("parameters", "tokens", "lr", "batch"),
    [  # 10 to the power of log10(1.79) - 0.713 log10(N) + 0.307 log10(D), and so on, by hand
        (1e9, 1e11, 10 ** (0.252853 - 6.417 + 3.377), 10 ** (-0.236572 + 6.281)),
        (1e8, 1e10, 10 ** (0.252853 - 5.704 + 3.07), 10 ** (-0.236572 + 5.71)),
        (1.0, 1.0, 1.79, 0.58),
    ],
)
def test_step_law(parameters, tokens, lr, batch):
    assert step_law(parameters, tokens) == pytest.approx((lr, batch), rel=1e-5)


def test_the_batch_law():
    assert minicpm_batch(1.0) == 1.21e9
    assert minicpm_batch(2.0) == pytest.approx(1.21e9 / (64 * 2**0.24))
    assert minicpm_batch(3.0) == pytest.approx(10 ** (9.0827854 - 6.24 * 0.47712125), rel=1e-6)


@pytest.mark.parametrize("law", [lambda: step_law(0, 1), lambda: step_law(1, -1), lambda: minicpm_batch(0)])
def test_numbers_without_a_law(law):
    with pytest.raises(ValueError, match="must be above 0"):
        law()


def curve(loss, top=0.9, slope=6.0, middle=0.5, floor=0.0):
    return floor + (top - floor) / (1 + math.exp(slope * (loss - middle)))


@pytest.mark.parametrize("truth", [dict(), dict(floor=0.25), dict(slope=40.0, middle=0.3), dict(top=0.4, middle=1.1)])
def test_a_sigmoid_without_noise_is_found(truth):
    points = [(x, curve(x, **truth)) for x in np.linspace(0.1, 1.4, 14)] + [(math.nan, 0.1), (0.2, math.inf)]
    fit = sigmoid_fit(points, truth.get("floor", 0.0))
    assert (fit.top, fit.slope, fit.middle) == pytest.approx(
        [curve(0.0, **truth), *({"slope": 6.0, "middle": 0.5, **truth}[name] for name in ("slope", "middle"))], rel=1e-3
    )
    assert [fit(x) for x, _ in points[:14]] == pytest.approx([y for _, y in points[:14]], abs=1e-5)
    assert fit.interval(0.0) < 1e-4


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Of the curve and of new points, inside the fitted losses and beyond them."""
    random, inside = (
        np.random.default_rng(0),
        dict.fromkeys([(x, new) for x in (0.35, 0.9) for new in (False, True)], 0),
    )
    runs = 120
    for _ in range(runs):
        xs = random.uniform(0.3, 1.2, 15)
        fit = sigmoid_fit((x, curve(x) + random.normal(0, 0.02)) for x in xs)
        for x, new in inside:
            value = curve(x) + (random.normal(0, 0.02) if new else 0.0)
            inside[x, new] += abs(fit(x) - value) <= fit.interval(x, new)
    assert all(0.88 <= n / runs <= 1 for n in inside.values()), inside
    assert fit.interval(0.35) < fit.interval(0.1) < fit.interval(0.0), "wider where there are no points"


def test_the_top_is_at_most_one():
    fit = sigmoid_fit((x, curve(x, top=1.3)) for x in np.linspace(0.45, 1.2, 10))
    assert fit.top == fit(0.0) == 1.0
    assert fit.interval(0.0) == 0.0


def test_what_falls_exponentially_is_found_beyond_the_points():
    """As the share of answers without a mistake does where each token may be one, up to 1 at a loss of 0."""
    random = np.random.default_rng(0)
    fit = sigmoid_fit((x, math.exp(-8 * x) + random.normal(0, 0.005)) for x in np.linspace(0.1, 0.8, 30))
    for x in (0.0, 0.03, 0.06):
        assert abs(fit(x) - math.exp(-8 * x)) < min(0.1, 1e-9 + fit.interval(x)), x


@pytest.mark.parametrize("top", [0.9, 1.3])
def test_the_interval_is_by_the_derivatives(top):
    """By differences, of the curve that the fit's numbers make, where its top is free and where it is at its bound."""
    points = [(x, curve(x, top) + 0.01 * math.sin(50 * x)) for x in np.linspace(0.4, 1.2, 12)]
    fit = sigmoid_fit(points)
    numbers, free = np.array([fit.top, fit.slope, fit.middle]), slice(int(fit.top == 1), 3)

    def made(numbers, x):
        top, slope, middle = numbers
        return top * (1 + math.exp(-slope * middle)) / (1 + math.exp(slope * (x - middle)))

    def derivatives(x):
        return np.array([(made(numbers + d, x) - made(numbers - d, x)) / 2e-6 for d in 1e-6 * np.eye(3)])[free]

    columns = np.array([derivatives(x) for x, _ in points])
    around = derivatives(0.2) @ np.linalg.inv(columns.T @ columns) @ derivatives(0.2)
    spread = math.sqrt(sum((made(numbers, x) - y) ** 2 for x, y in points) / fit.freedom)
    assert (fit.top == 1) == (top > 1)
    assert fit(0.2) == pytest.approx(made(numbers, 0.2))
    assert fit.interval(0.2) == pytest.approx(student(fit.freedom) * spread * math.sqrt(around), rel=1e-4)


@pytest.mark.parametrize(
    ("points", "floor", "message"),
    [
        ([(1, 0.1)] * 5, 0.0, "needs 6 points with a loss and a score, and has 5"),
        ([(1, 0.1 * i) for i in range(8)], 0.0, "all 8 points have the same loss"),
        ([(i, 0.5) for i in range(8)], 0.0, "or the same score"),
        ([(i, 0.1 * i) for i in range(8)], 1.0, "floor is 1.0: it must be at least 0 and below 1"),
    ],
)
def test_points_without_a_sigmoid(points, floor, message):
    with pytest.raises(ValueError, match=message):
        sigmoid_fit(points, floor)
