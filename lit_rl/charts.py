"""Line charts of a run's metrics as SVG. Standard library only."""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections.abc import Callable, Iterable
from contextlib import suppress
from html import escape
from itertools import groupby, pairwise
from typing import Any

from lit_rl.entropy_law import FEWEST, FIRST, fit

Points = list[tuple[float, float]]
"""(step, value), in order of steps; a value may be NaN or infinite."""
Scale = Callable[[float], float]
MAIN = {  # title: (names as a regular expression, y axis, how to get them)
    "Reward": (r"reward", "mean of a step", "Methods of reinforcement learning log it; SFT has none."),
    "Validation": (r"val/([^/]+/)?(pass|maj)@\d+", "share of tasks", "Set the Trainer's val_check_interval."),
    "Entropy": (r"([^/]+/)?entropy", "nats a token", "Add the EntropyMonitor callback."),
    "Response length": (r"([^/]+/)?length/mean", "tokens, mean of a step", "Add the RolloutStats callback."),
    "Loss": (r"loss|train_loss|train/loss", "mean of a step", "Every method of lit-rl logs “loss”."),
    "Gradient norm": (r"([^/]+/)?grad_norm", "before clipping", "Every method of lit-rl logs it."),
}
FURTHER = {  # title: {names as a regular expression: y axis}
    "Reward by family": {r"reward/.+": "mean of a step", r"reward_std": "of all responses"},
    "Validation by family": {r"val/pass@1/.+": "share of responses"},
    "Groups and verifier": {r"groups/.+": "share of groups", r"invalid": "share of responses", r"skipped/.+": "events"},
    "Ratio and clipping": {r"ratio/.+": "policy / old policy", r"clip_fraction": "share of tokens", r"ess": "share"},
    "Length": {r"length/max": "tokens", r"length/truncated": "share of responses"},
    "Time": {r"seconds/.+": "seconds a step", r"tokens_per_second": "response tokens"},
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 216, 54, 466, 10, 184
SMOOTH_FROM, DRAWN, TOOLTIPS = 30, 600, 60
"""Points above which a moving average is drawn; points and tooltips of a chart, at most."""


def to_curves(rows: Iterable[dict[str, Any]]) -> dict[str, Points]:
    """A curve a name. Steps must advance: what a later `validate` logs is not part of the training."""
    curves: dict[str, Points] = {}
    for row in rows:
        step = number(row.get("step"))
        values = {k: v for k, v in row.items() if k not in ("step", "epoch", "") and v not in (None, "")}
        for name, value in values.items() if math.isfinite(step) else ():
            points = curves.setdefault(name, [])
            if not points or step > points[-1][0]:
                points.append((step, number(value)))
    return {name: curves[name] for name in sorted(curves, key=natural) if not name.startswith("test/")}


def natural(name: str) -> list[Any]:
    """Sorts pass@2 before pass@16, and maj@16 beside it."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.replace("maj@", "pass@"))]


def number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def finite(points: Points) -> list[float]:
    return [v for _, v in points if math.isfinite(v)]


def show(value: Any, spec: str = ".3g") -> str:
    text = f"{number(value):{spec}}".replace("e-0", "e-").replace("-", "−").replace("inf", "∞")
    return "–" if "nan" in text else text


def missing(what: str, how: str) -> str:
    return f'<p class="dim">No {what}. {how}</p>'


def charts(curves: dict[str, Points]) -> str:
    """The main charts, and all that was logged besides in groups that are folded."""
    if not curves:
        return missing("metrics", "The logger of lit-rl fit, RunLogger, writes them; CSVLogger's are read as well.")
    steps, left = [step for points in curves.values() for step, _ in points], dict(curves)

    def take(pattern: str, unit: str, title: str = "") -> str:
        chosen = {name: left.pop(name) for name in list(left) if re.fullmatch(pattern, name)}
        title = title or re.sub(r"\\|(?<=/)\.\+", "", pattern)
        return figure(title.rstrip("/"), unit, chosen, min(steps), max(steps)) if chosen else ""

    main = [
        take(pattern, unit, title) or f"<figure><figcaption>{title}</figcaption>{missing('values', how)}</figure>"
        for title, (pattern, unit, how) in MAIN.items()
    ]
    main.append(law(curves))
    groups = {title: [take(*chart) for chart in group.items()] for title, group in FURTHER.items()}
    groups["Everything else"] = [take(re.escape(name), "", name) for name in list(left)]
    note = f"Over {SMOOTH_FROM} steps, the pale line is each step; the strong one, whose numbers are given, is their"
    note += " moving average. Every y axis includes zero."
    return f'<p class="dim">{note}</p><div class="grid">{"".join(main)}</div>' + "".join(
        f'<details class="group"><summary>{title}</summary><div class="grid">{"".join(group)}</div></details>'
        for title, group in groups.items()
        if any(group)
    )


def figure(title: str, unit: str, curves: dict[str, Points], first: float, end: float) -> str:
    """One chart with its legend."""
    values = [v for points in curves.values() for v in finite(points)]
    svg, x, y = axes("step", first, end, values, smallest=1.0)
    folder = min((name.rpartition("/")[0] for name in curves), key=len) + "/"
    lines, legend = {}, []
    for i, (name, points) in enumerate(curves.items()):
        label, look = name.removeprefix(folder), f'class="d{i // 8 % 3}" style="--c:var(--c{i % 8})"'
        line = lines[label] = smooth(points) if len(points) > SMOOTH_FROM else points
        drawn = polylines([(x(s), y(v)) for s, v in thin(line)])
        if line is points:
            drawn += dots(points, x, y, 3)
        elif len(curves) <= 4:
            drawn = polylines([(x(s), y(v)) for s, v in thin(points)], "raw") + drawn
        svg.append(f"<g {look}>{drawn}</g>")
        legend.append(entry(look, f"{escape(label)}, last {show(line[-1][1])}"))
    lost = sum(map(len, curves.values())) - len(values)
    warn = f'<p class="dim wrong">Not drawn: {lost} NaN or infinite.</p>' if lost else ""
    return frame(title, unit, "step", "".join(svg) + tooltips(lines, x), legend, warn)


def law(curves: dict[str, Points]) -> str:
    """Reward against entropy with the fitted curve, and the forecast of the first steps; validation where it has enough."""
    rewards = {name: pair(curves.get("entropy", []), curves.get(name, [])) for name in ("val/pass@1", "reward")}
    name = next((name for name, points in rewards.items() if len(points) >= FEWEST), "reward")
    points = rewards[name]
    try:
        fits = {"fit of all": fit(points)}
    except ValueError as error:
        return f"<figure><figcaption>Entropy law</figcaption>{missing('fit', f'{error}.'.capitalize())}</figure>"
    if len(points) >= 2 * FIRST:
        with suppress(ValueError):
            fits[f"fit of the first {FIRST}"] = fit(points[:FIRST])
    whole, hs = fits["fit of all"], [0.0, *(h for h, _ in points)]
    first, end = min(hs), max(hs)
    svg, x, y = axes("entropy", first, end, [*(r for _, r in points), whole.ceiling, whole(end)])
    svg += [f'<g style="--c:var(--c7)">{dots(thin(sorted(points)), x, y, 2)}</g>']
    legend = []
    for i, (label, found) in enumerate(fits.items()):
        look = f'class="d{i}" style="--c:var(--c{i})"'
        line = [(x(h), y(found(h))) for h in (first + (end - first) * k / 60 for k in range(61))]
        svg.append(f"<g {look}>{polylines([(a, b if TOP <= b <= BOTTOM else math.nan) for a, b in line])}</g>")
        ceiling = f"ceiling {show(found.ceiling)} ± {show(found.interval(0.0))}"
        legend.append(entry(look, f"{label}: {show(-found.a)} e<sup>H</sup> + {show(found.b)}, {ceiling}"))
    h, r = points[-1]
    said = [f"at the last entropy, {show(f(h))} ± {show(f.interval(h, new=True))}" for f in list(fits.values())[1:]]
    note = f'<p class="dim">The first {FIRST} predict {said[0]}; it was {show(r)}.</p>' if said else ""
    return frame("Entropy law", f"{escape(name)}, by nats a token", "entropy", "".join(svg), legend, note)


def pair(entropy: Points, reward: Points) -> Points:
    """(entropy, reward) of each step that has both, or a reward and an entropy before it."""
    steps = [step for step, _ in entropy]
    found = [(bisect(steps, step), value) for step, value in reward]
    pairs = [(entropy[i - 1][1], value) for i, value in found if i]
    return [(h, r) for h, r in pairs if math.isfinite(h + r)]


def axes(
    label: str, first: float, end: float, values: list[float], smallest: float = 0.0
) -> tuple[list[str], Scale, Scale]:
    """Grid and labels, and the scales from numbers to pixels. The y axis includes zero and all finite values."""
    low, high = min([0.0, *values]), max([0.0, *values])
    grid = ticks(low, high if high > low else 1.0)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / ((end - first) or 1) * (RIGHT - LEFT), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (value - grid[0]) / (grid[-1] - grid[0]) * (BOTTOM - TOP), 1)

    svg = [f'<text text-anchor="end" x="{RIGHT}" y="{HEIGHT - 2}">{label}</text>']
    for v in grid:
        svg.append(f'<line class="{"" if v else "zero"}" x1="{LEFT}" x2="{RIGHT}" y1="{y(v)}" y2="{y(v)}"/>')
        svg.append(f'<text class="y" text-anchor="end" x="{LEFT - 7}" y="{y(v) + 4:.1f}">{show(v, ".6g")}</text>')
    for s in (s for s in ticks(first, end, smallest) if first <= s <= end):
        svg.append(f'<text class="x" text-anchor="middle" x="{x(s)}" y="{BOTTOM + 17}">{show(s, ".6g")}</text>')
    return svg, x, y


def entry(look: str, text: str) -> str:
    """One of a legend."""
    return f'<li><svg viewBox="0 0 22 8" aria-hidden="true"><g {look}><path d="M1,4H21"/></g></svg> {text}</li>'


def frame(title: str, unit: str, by: str, svg: str, legend: list[str], note: str) -> str:
    return (
        f'<figure><figcaption>{escape(title)} <span class="dim">{unit}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by {by}">{svg}</svg>'
        f"<ul>{''.join(legend)}</ul>{note}</figure>"
    )


def dots(points: Points, x: Scale, y: Scale, radius: int) -> str:
    return "".join(f'<circle cx="{x(a)}" cy="{y(b)}" r="{radius}"/>' for a, b in points if math.isfinite(b))


def ticks(low: float, high: float, smallest: float = 0.0) -> list[float]:
    """About five round numbers that enclose low to high."""
    raw = max((high - low) / 5.5, smallest)
    step = 10 ** math.floor(math.log10(raw))
    step *= next(m for m in (1, 2, 5, 10) if m * step >= raw * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def smooth(points: Points) -> Points:
    """The exponential moving average over about a thirtieth of the points, unbiased at its start."""
    decay, mean, weight, result = 1 - 2 / (max(10, len(points) / 30) + 1), 0.0, 0.0, []
    for step, value in points:
        if math.isfinite(value):
            mean, weight = decay * mean + (1 - decay) * value, decay * weight + (1 - decay)
        result.append((step, mean / weight if math.isfinite(value) else math.nan))
    return result


def thin(points: Points) -> Points:
    """No more points than can be seen: of each stretch the lowest and the highest."""
    size = max(1, math.ceil(2 * len(points) / DRAWN))
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    seen = [[p for p in stretch if math.isfinite(p[1])] or stretch[:1] for stretch in stretches]
    return [p for s in seen for p in sorted({min(s, key=lambda p: p[1]), max(s, key=lambda p: p[1])})]


def polylines(pixels: Points, look: str = "line") -> str:
    """A curve, broken where a value is not finite."""
    runs = [list(run) for whole, run in groupby(pixels, key=lambda p: math.isfinite(p[1])) if whole]
    texts = [" ".join(f"{x},{y}" for x, y in run[:1] + run) for run in runs]  # a point alone shows as a dot
    return "".join(f'<polyline class="{look}" points="{text}"/>' for text in texts)


def tooltips(lines: dict[str, Points], x: Scale) -> str:
    """Strips that show the numbers under the pointer, without a script."""
    values = {label: dict(line) for label, line in lines.items()}
    steps = sorted({step for line in values.values() for step in line})
    steps = steps[:: math.ceil(len(steps) / TOOLTIPS)]
    edges = [LEFT, *((x(a) + x(b)) / 2 for a, b in pairwise(steps)), RIGHT]
    result = ""
    for s, (a, b) in zip(steps, pairwise(edges), strict=True):
        text = escape("\n".join([f"step {s:g}", *(f"{name} {show(v[s])}" for name, v in values.items() if s in v)]))
        size = f'x="{a:.1f}" width="{b - a:.1f}" y="{TOP}" height="{BOTTOM - TOP}"'
        result += f"<rect {size}><title>{text}</title></rect>"
    return result
