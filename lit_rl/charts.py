"""Line charts of a run's metrics as SVG. Standard library only."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from html import escape
from itertools import groupby, pairwise
from typing import Any

Points = list[tuple[float, float]]
"""(step, value), in order of steps; a value may be NaN or infinite."""
MAIN = {  # title: (names as a regular expression, y axis, how to get them)
    "Reward": (r"reward", "mean of a step", "Methods of reinforcement learning log it; SFT has none."),
    "Validation": (r"val/(pass|maj)@\d+", "share of tasks", "Set the Trainer's val_check_interval."),
    "Entropy": (r"entropy", "nats a token", "Add the EntropyMonitor callback."),
    "Response length": (r"length/mean", "tokens, mean of a step", "Add the RolloutStats callback."),
    "Loss": (r"loss|train_loss|train/loss", "mean of a step", "Every method of lit-rl logs “loss”."),
    "Gradient norm": (r"grad_norm", "before clipping", "Every method of lit-rl logs it."),
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
    """A curve a name. Steps must advance: what a later `validate` logs at step 0 is not part of the training."""
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
    groups = {title: [take(*chart) for chart in group.items()] for title, group in FURTHER.items()}
    groups["Everything else"] = [take(re.escape(name), "", name) for name in list(left)]
    note = f"Over {SMOOTH_FROM} steps, the pale line is each step; the strong one, whose numbers are given, is their"
    note += " moving average. Every y axis holds zero."
    return f'<p class="dim">{note}</p><div class="grid">{"".join(main)}</div>' + "".join(
        f'<details class="group"><summary>{title}</summary><div class="grid">{"".join(group)}</div></details>'
        for title, group in groups.items()
        if any(group)
    )


def figure(title: str, unit: str, curves: dict[str, Points], first: float, end: float) -> str:
    """One chart with its legend."""
    values = [v for points in curves.values() for v in finite(points)]
    low, high = min([0.0, *values]), max([0.0, *values])
    grid = ticks(low, high if high > low else 1.0)

    def x(step: float) -> float:
        return round(LEFT + (step - first) / ((end - first) or 1) * (RIGHT - LEFT), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (value - grid[0]) / (grid[-1] - grid[0]) * (BOTTOM - TOP), 1)

    svg = [f'<text text-anchor="end" x="{RIGHT}" y="{HEIGHT - 2}">step</text>']
    for v in grid:
        svg.append(f'<line class="{"" if v else "zero"}" x1="{LEFT}" x2="{RIGHT}" y1="{y(v)}" y2="{y(v)}"/>')
        svg.append(f'<text class="y" text-anchor="end" x="{LEFT - 7}" y="{y(v) + 4:.1f}">{show(v, ".6g")}</text>')
    for s in (s for s in ticks(first, end, smallest=1.0) if first <= s <= end):
        svg.append(f'<text class="x" text-anchor="middle" x="{x(s)}" y="{BOTTOM + 17}">{show(s, ".6g")}</text>')
    folder = min((name.rpartition("/")[0] for name in curves), key=len) + "/"
    lines, legend = {}, []
    for i, (name, points) in enumerate(curves.items()):
        label, look = name.removeprefix(folder), f'class="d{i // 8 % 3}" style="--c:var(--c{i % 8})"'
        line = lines[label] = smooth(points) if len(points) > SMOOTH_FROM else points
        drawn = polylines([(x(s), y(v)) for s, v in thin(line)])
        if line is points:
            drawn += "".join(f'<circle cx="{x(s)}" cy="{y(v)}" r="3"/>' for s, v in points if math.isfinite(v))
        elif len(curves) <= 4:
            drawn = polylines([(x(s), y(v)) for s, v in thin(points)], "raw") + drawn
        svg.append(f"<g {look}>{drawn}</g>")
        key = f'<svg viewBox="0 0 22 8" aria-hidden="true"><g {look}><path d="M1,4H21"/></g></svg>'
        legend.append(f"<li>{key} {escape(label)}, last {show(line[-1][1])}</li>")
    lost = sum(map(len, curves.values())) - len(values)
    warn = f'<p class="dim wrong">Not drawn: {lost} NaN or infinite.</p>' if lost else ""
    return (
        f'<figure><figcaption>{escape(title)} <span class="dim">{unit}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step">{"".join(svg)}'
        f"{tooltips(lines, x)}</svg><ul>{''.join(legend)}</ul>{warn}</figure>"
    )


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


def tooltips(lines: dict[str, Points], x: Callable[[float], float]) -> str:
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
