"""`lit-rl report`: one self-contained HTML page of a run's folder. No torch, no plotting library: it starts at once."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from html import escape
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]
"""(step, value), in order of steps; a value may be NaN or infinite."""

MAIN = {  # title: (names as a regular expression, y axis, how to get them)
    "Reward": (r"reward", "mean of a step", "Methods of reinforcement learning log it; SFT has none."),
    "Validation": (r"val/(pass|maj)@\d+", "share of tasks", "Set the Trainer's val_check_interval."),
    "Entropy": (r"entropy", "nats a token", "Add the EntropyMonitor callback."),
    "Response length": (r"length/mean", "tokens, mean of a step", "Add the RolloutStats callback."),
    "Loss": (r"loss|train_loss|train/loss", "mean of a step", "Every method of lit-rl logs “loss”."),
}
FURTHER = {  # title: {names as a regular expression: y axis}
    "Reward by family": {r"reward/.+": "mean of a step", r"reward_std": "of all responses"},
    "Validation by family": {r"val/pass@1/.+": "share of responses"},
    "Groups and verifier": {r"groups/.+": "share of groups", r"invalid": "share of responses", r"skipped/.+": "events"},
    "Ratio and clipping": {r"ratio/.+": "policy / old policy", r"clip_fraction": "share of tokens", r"ess": "share"},
    "Optimisation": {r"grad_norm": "before clipping", r"lr\b.*": "learning rate"},
    "Length": {r"length/max": "tokens", r"length/truncated": "share of responses"},
    "Time": {r"seconds/.+": "seconds a step", r"tokens_per_second": "response tokens"},
}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 216, 50, 14, 10, 32
SMOOTH_FROM, DRAWN, STRIPS = 30, 600, 60
"""Points above which a moving average is drawn; points drawn of a curve, at most; tooltips of a chart, at most."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2126;--dim:#5b6570;--line:#dfe3e8;--good:#00664b;--bad:#a84300;--c0:#0072b2;
--c1:#d55e00;--c2:#009e73;--c3:#b8578f;--c4:#a87900;--c5:#3b9bd4;--c6:#5b4fa8;--c7:#6b6b6b}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14181c;--fg:#e4e8ec;--dim:#98a3ae;--line:#2f373f;--good:#4fd1a5;
--bad:#ff9a5c;--c0:#58b0ee;--c1:#ff8a47;--c2:#35c79a;--c3:#e08dbd;--c4:#e6b422;--c5:#9ad4f5;--c6:#a79bf0;--c7:#b0b0b0}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1120px;padding:2rem 1.25rem 4rem;background:var(--bg);
color:var(--fg);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.9rem;line-height:1.2;margin:0}h2{font-size:1.3rem;margin:2.6rem 0 .5rem}h3{font-size:1rem;margin:1.4rem 0 .4rem}
p{margin:.4rem 0}.dim,dt,thead th,.y-axis{color:var(--dim);font-size:.84rem;font-weight:400}.wrong{color:var(--bad)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:.7rem 1.2rem;margin:1.2rem 0;padding:.9rem 1rem}
dl,figure,.card{border:1px solid var(--line);border-radius:8px}dd{margin:0;overflow-wrap:anywhere}.right{color:var(--good)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:1rem;margin:.8rem 0}
figure,.card{margin:0;padding:.8rem .9rem;break-inside:avoid;min-width:0}.card{margin:.8rem 0}figcaption{font-weight:600}
svg{display:block;width:100%;height:auto}svg text{fill:var(--dim);font-size:12px}.rule{stroke:var(--line)}.zero{stroke:var(--dim)}
polyline{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}circle{fill:var(--c)}
.raw{stroke-width:1;stroke-opacity:.4}.d1{stroke-dasharray:7 4}.d2{stroke-dasharray:1 4}
.hit{fill:transparent}.hit:hover{fill:var(--fg);fill-opacity:.1}
ul{display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.82rem;margin:.3rem 0 0;padding:0;list-style:none}
li svg{display:inline-block;width:22px;height:8px;margin-right:.35rem;vertical-align:middle}
details{margin:.7rem 0}summary{cursor:pointer;overflow-wrap:anywhere}details[open]>summary>.start{display:none}
.group{border-top:1px solid var(--line);padding-top:.7rem}.group>summary{font-weight:600}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%;font-size:.92rem}td svg{width:150px}
th,td{padding:.35rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line);font-weight:400}
tr>:first-child{text-align:left}tbody tr:last-child>*{border-top:2px solid var(--dim);font-weight:600}
.badge{font-weight:600;padding:.1rem .5rem;margin-right:.5rem;border:1.5px solid;border-radius:99px}.who{margin:.7rem 0 .1rem}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;font:.86rem/1.5 ui-monospace,Menlo,Consolas,monospace}
@media print{body{max-width:none;padding:0;font-size:12px}.grid{grid-template-columns:1fr 1fr}
details::details-content{content-visibility:visible;block-size:auto}}
"""
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width,initial-scale=1">"""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes one self-contained HTML page of the run in folder `run`, to `out` or run/report.html; returns its path."""
    run = Path(run)
    names = ("metrics.jsonl", "metrics.csv", "evaluations.jsonl", "completions.jsonl")
    if not any((run / name).is_file() for name in names):
        below = sorted({str(p.parent) for name in names for depth in ("*", "*/*") for p in run.glob(f"{depth}/{name}")})
        hint = f" These do: {', '.join(below[:5])}." if below else ""
        raise FileNotFoundError(f"{run} holds no run: none of {', '.join(names)}.{hint}")
    config = read_config(run)
    curves = to_curves(list(records(run / names[0])) or records(run / names[1]))
    evaluations = [e for e in records(run / names[2]) if e.get("rows")]
    title = " on ".join(filter(None, [last(dig(config, "model", "class_path")), model_of(config)])) or run.resolve().name
    body = [
        f'<h1>{escape(title)}</h1><p class="dim">{escape(str(run.resolve()))}</p>',
        facts(config, curves, evaluations),
        f"<h2>Training</h2>{charts(curves)}",
        f"<h2>Evaluation</h2>{comparisons(evaluations)}",
        f"<h2>Sample completions</h2>{samples(run / names[3])}",
        f"<h2>Configuration</h2>{fold(json.dumps(config, indent=2, ensure_ascii=False, default=str), 0)}" * bool(config),
    ]
    head = f"{HEAD}<title>{escape(title)}</title><style>{STYLE}</style></head>"
    out = run / "report.html" if out is None else Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([head, "<body>", *body, "</body></html>\n"]), encoding="utf-8", errors="replace")
    return out


# -------------------------------------------------------------------- reading


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file, or the JSON lines of another, without one cut short by a crash; none without the file."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file, restkey="")
            return
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict):
                yield record


def read_config(run: Path) -> dict[str, Any]:
    """What was run; empty when that is not known."""
    paths = [p for p in (run / "config.yaml", run / "config_test.yaml", run / "config_validate.yaml") if p.is_file()]
    try:
        import yaml

        config = yaml.safe_load(paths[0].read_text(encoding="utf-8")) if paths else None
    except Exception:  # no PyYAML, or a file that it does not understand: the page does without
        config = None
    return config if isinstance(config, dict) else {}


def dig(config: Any, *keys: str) -> Any:
    """config[key][key]..., or None."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def to_curves(rows: Iterable[dict[str, Any]]) -> dict[str, Points]:
    """A curve a name. Steps must advance: what a later `validate` logs at step 0 is not part of the training."""
    curves: dict[str, Points] = {}
    for row in rows:
        step = number(row.pop("step", None))
        for name, value in row.items():
            if math.isfinite(step) and value not in (None, "") and name not in ("epoch", ""):
                points = curves.setdefault(name, [])
                if not points or step > points[-1][0]:
                    points.append((step, number(value)))
    return {name: curves[name] for name in sorted(curves, key=natural) if not name.startswith("test/")}


def natural(name: str) -> list[Any]:
    """Sorts pass@2 before pass@16."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


# -------------------------------------------------------------------- words and numbers


def compact(value: float, digits: int = 4) -> str:
    """0.1235, -12k, 1.5e-7."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "–")
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / (1e3 if letter == 'k' else size):.{digits}g}{letter}"
    text = f"{value:.{digits - 1}e}" if 0 < abs(value) < 1e-3 else f"{value:.{digits}g}"
    return re.sub(r"\.?0*e([+-])0*", r"e\1", text).replace("-", "−").replace("e+", "e")


def fixed(value: Any, digits: int = 3, sign: str = "") -> str:
    value = number(value)
    return f"{value:{sign}.{digits}f}".replace("-", "−") if math.isfinite(value) else compact(value)


def missing(what: str, how: str) -> str:
    return f'<p class="dim">No {what}. {how}</p>'


def facts(config: dict[str, Any], curves: dict[str, Points], evaluations: list[dict[str, Any]]) -> str:
    """What was run, and the one number that it was run for."""
    init = dig(config, "model", "init_args")
    steps = int(max((points[-1][0] for points in curves.values()), default=-1)) + 1
    clock = [[v for _, v in points if math.isfinite(v)] for name, points in curves.items() if name.startswith("seconds/")]
    seconds = round(steps * sum(sum(values) / len(values) for values in clock if values))
    limit = dig(config, "trainer", "max_steps")
    known = {
        "Method": last(dig(config, "model", "class_path")),
        "Model": model_of(config),
        "Data": last(dig(config, "data", "class_path")),
        "Steps": steps and f"{steps:,}" + (f" of {limit:,}" if isinstance(limit, int) and limit > 0 else ""),
        "Time in steps": seconds and f"≈ {seconds // 3600} h {seconds // 60 % 60:02d} min {seconds % 60:02d} s",
        "Seed": dig(init, "seed") if dig(init, "seed") is not None else dig(config, "seed_everything"),
        "Learning rate": dig(init, "lr"),
        "Responses a prompt": dig(init, "group"),
    }
    for stage, tables in by_stage(evaluations).items():
        values = [fixed(dig(of_family(e, "mean"), "pass_at", "1")) for e in tables[:1] + tables[1:][-1:]]
        known[f"pass@1, {stage}"] = " → ".join(values)
    rows = [f"<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>" for k, v in known.items() if v not in (None, "", 0) or k == "Seed"]
    return f"<dl>{''.join(rows)}</dl>"
