"""`lit-rl report`: one self-contained HTML page of a run's folder. No torch, no plotting library: it starts at once."""

from __future__ import annotations

import csv
import json
import math
from datetime import timedelta
from html import escape
from pathlib import Path
from typing import Any

from lit_rl import jsonl
from lit_rl.charts import Points, charts, finite, missing, number, show, to_curves

FILES = ("metrics.jsonl", "metrics.csv", "evaluations.jsonl", "completions.jsonl")
FOLDED = 600
"""Characters of a text before it is folded."""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2126;--dim:#5b6570;--line:#dfe3e8;--good:#00664b;--bad:#a84300;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b8578f;--c4:#a87900;--c5:#3b9bd4;--c6:#5b4fa8;--c7:#6b6b6b}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14181c;--fg:#e4e8ec;--dim:#98a3ae;--line:#2f373f;
--good:#4fd1a5;--bad:#ff9a5c;--c0:#58b0ee;--c1:#ff8a47;--c2:#35c79a;--c3:#e08dbd;--c4:#e6b422;--c5:#9ad4f5;
--c6:#a79bf0;--c7:#b0b0b0}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1120px;padding:2rem 1.25rem 4rem;color:var(--fg);
background:var(--bg);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.9rem;line-height:1.2;margin:0}h2{font-size:1.3rem;margin:2.6rem 0 .5rem}
h3{font-size:1rem;margin:1.4rem 0 .4rem}p{margin:.4rem 0}
.dim,dt,thead th{color:var(--dim);font-size:.84rem;font-weight:400;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(145px,1fr));gap:.7rem 1.2rem;margin:1rem 0;padding:.9rem}
dl,figure,.card{border:1px solid var(--line);border-radius:8px}dd{margin:0;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:1rem;margin:.8rem 0}
figure,.card{margin:0;padding:.8rem .9rem;break-inside:avoid;min-width:0}.card{margin:.8rem 0}
figcaption{font-weight:600}svg{display:block;width:100%;height:auto}svg text{fill:var(--dim);font-size:12px}
line{stroke:var(--line)}
polyline,path{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
circle{fill:var(--c)}.zero{stroke:var(--dim)}
.raw{stroke-width:1;stroke-opacity:.4}.d1{stroke-dasharray:7 4}.d2{stroke-dasharray:1 4}
rect{fill:transparent}rect:hover{fill:var(--fg);fill-opacity:.1}li svg{display:inline-block;width:22px;height:8px}
ul{display:flex;flex-wrap:wrap;gap:.1rem .9rem;font-size:.82rem;margin:.3rem 0 0;padding:0;list-style:none}
details{margin:.7rem 0}summary{cursor:pointer;overflow-wrap:anywhere}details[open]>summary>.start{display:none}
.group{border-top:1px solid var(--line);padding-top:.7rem}.group>summary{font-weight:600}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%;font-size:.92rem}th,td{white-space:nowrap}
thead th{overflow-wrap:normal}.text+.dim{margin-top:.7rem}dl:empty{display:none}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid var(--line);font-weight:400;vertical-align:bottom}
tr>:first-child{text-align:left;padding-left:0}tbody tr:last-child>*{border-top:2px solid var(--dim);font-weight:600}
.badge{font-weight:600;padding:.1rem .5rem;margin-right:.5rem;border:1.5px solid;border-radius:99px}
.right{color:var(--good)}.right::before{content:"✓ "}.wrong{color:var(--bad)}.badge.wrong::before{content:"✗ "}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;font:.86rem/1.5 ui-monospace,Menlo,monospace}
@media print{body{max-width:none;padding:0;font-size:12px}.grid{grid-template-columns:1fr 1fr}
details::details-content{content-visibility:visible;block-size:auto}}
"""
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width,initial-scale=1">"""


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes one self-contained HTML page of the run in folder `run`, to `out` or run/report.html; returns its path."""
    run = Path(run)
    metrics, table, evaluated, sampled = paths = [run / name for name in FILES]
    if not any(path.is_file() for path in paths):
        below = sorted({str(p.parent) for name in FILES for deep in ("*", "*/*") for p in run.glob(f"{deep}/{name}")})
        hint = f" These do: {', '.join(below[:5])}." if below else ""
        raise FileNotFoundError(f"{run} holds no run: it has none of {', '.join(FILES)}.{hint}")
    config = read_config(run / "config.yaml")
    curves = to_curves(records(metrics if metrics.is_file() else table))
    evaluations = [e for e in records(evaluated) if e.get("rows")]
    stages = {s: [e for e in evaluations if e.get("stage") == s] for s in ("test", "val")}
    known = facts(config, curves)
    title = " on ".join(known[key] for key in ("Method", "Model") if known[key]) or run.resolve().name
    cells = [f"<div><dt>{k}</dt><dd>{escape(str(v))}</dd></div>" for k, v in known.items() if v not in (None, "")]
    page = [
        f"{HEAD}<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f'<h1>{escape(title)}</h1><p class="dim">{escape(str(run.resolve()))}</p><dl>{"".join(cells)}</dl>',
        f"<h2>Training</h2>{charts(curves)}",
        f"<h2>Evaluation</h2>{comparisons(stages)}",
        f"<h2>Sample completions</h2>{samples(sampled)}",
        f"<h2>Configuration</h2>{fold(json.dumps(config, indent=2, default=str))}" if config else "",
        "</body></html>\n",
    ]
    out = run / "report.html" if out is None else Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(page), encoding="utf-8", errors="replace")
    return out


def records(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV file, or the JSON lines of another."""
    if path.suffix != ".csv":
        return jsonl.read(path)
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        return list(csv.DictReader(file, restkey=""))


def read_config(path: Path) -> dict[str, Any]:
    """What was run; empty when that is not known."""
    try:
        import yaml

        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except Exception:  # no PyYAML, no file, or one it does not understand: the page does without
        config = None
    return config if isinstance(config, dict) else {}


def dig(config: Any, *keys: str) -> Any:
    """config[key][key]..., or None."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def facts(config: dict[str, Any], curves: dict[str, Points]) -> dict[str, Any]:
    init, limit = dig(config, "model", "init_args"), dig(config, "trainer", "max_steps")
    steps = int(max((points[-1][0] for points in curves.values()), default=-1)) + 1
    clocks = [finite(points) for name, points in curves.items() if name.startswith("seconds/")]
    seconds = round(steps * sum(sum(values) / len(values) for values in clocks if values))
    return {
        "Method": str(dig(config, "model", "class_path") or "").rpartition(".")[2],
        "Model": str(dig(init, "model") or ""),
        "Data": str(dig(config, "data", "class_path") or "").rpartition(".")[2],
        "Steps": f"{steps:,}" + (f" of {limit:,}" if isinstance(limit, int) and limit > 0 else "") if steps else "",
        "Time in steps": f"≈ {timedelta(seconds=seconds)} h" if seconds else "",
        "Seed": dig(config, "seed_everything") if dig(init, "seed") is None else dig(init, "seed"),
        "Learning rate": dig(init, "lr"),
        "Responses a prompt": dig(init, "group"),
    }


def pair(values: list[Any], spec: str = ".3f") -> str:
    return " → ".join(show(value, spec) for value in values)


def comparisons(stages: dict[str, list[dict[str, Any]]]) -> str:
    """Of each stage the first and the last evaluation, or the only one."""
    note = (
        "± is half of a 95 % interval by the normal approximation over tasks; that of a difference takes the two"
        " evaluations for independent. With few tasks, or where all ended alike, it says little. mean: over families."
    )
    tables = [comparison(stage, [of[0], of[-1]][: len(of)]) for stage, of in stages.items() if of]
    how = "Validate or test a policy of lit-rl before and after training; it writes evaluations.jsonl."
    return f'{"".join(tables)}<p class="dim">{note}</p>' if tables else missing("evaluations", how)


def comparison(stage: str, evaluations: list[dict[str, Any]]) -> str:
    sides = [{str(row.get("family")): row for row in e["rows"]} for e in evaluations]
    two, steps = len(sides) == 2, [e.get("step") for e in evaluations]
    labels = [f", step {s}" for s in steps] if len(set(steps)) == 2 else [", first", ", last"] if two else [""]
    k = min(max(map(int, dig(side, "mean", "pass_at") or [1])) for side in sides)
    samples = {int(dig(side, "mean", "samples") or 1) for side in sides}
    n = min(samples) if len(samples) == 1 else 1  # a vote of 4 and one of 8 do not compare
    head = ["family", "tasks", *(f"pass@1{label}" for label in labels)] + ["difference"] * two
    head += [f"pass@{k}"] * (k > 1) + [f"maj@{n}"] * (n > 1) + ["tokens"]
    lines = []
    for family in sorted(dict.fromkeys(name for side in sides for name in side), key="mean".__eq__):
        rows = [side.get(family, {}) for side in sides]
        means, halves = [number(at(r, 1)) for r in rows], [number(r.get("interval")) for r in rows]
        cells = [" → ".join(dict.fromkeys(show(r.get("items"), ".0f") for r in rows))]
        cells += [f"{show(m, '.3f')} ± {show(h, '.3f')}" for m, h in zip(means, halves, strict=True)]
        cells += [f"{show(means[-1] - means[0], '+.3f')} ± {show(math.hypot(*halves), '.3f')}"] * two
        cells += [pair([at(r, k) for r in rows])] * (k > 1) + [pair([r.get("majority") for r in rows])] * (n > 1)
        cells.append(pair([r.get("length") for r in rows], ".0f"))
        lines.append(f'<tr><th scope="row">{escape(family)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>')
    title = {"test": "Test", "val": "Validation"}[stage] + ", first and last" * two
    differ = len({frozenset(side) for side in sides}) > 1
    warn = '<p class="dim wrong">The families differ, so the means do not compare.</p>' if differ else ""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<h3>{title}</h3>{warn}<div class="wide">{table}</div>'


def at(row: dict[str, Any], k: int) -> Any:
    return dig(row, "pass_at", str(k))


def samples(path: Path) -> str:
    """A few right and a few wrong responses of the first and of the last step."""
    steps: dict[str, list[dict[str, Any]]] = {}
    for record in records(path):
        steps.setdefault(str(record.get("step")), []).append(record)
        if len(steps) > 2:
            del steps[list(steps)[1]]
    result = []
    for step, found in steps.items():
        found = [r for r in found if not r.get("off_policy")]
        right = sum(r.get("correct") is True for r in found)
        result.append(f"<h3>Step {escape(step)}: {right} of {len(found)} responses right</h3>")
        for mark in (True, False, None):
            task_of = {str(r.get("task")): r for r in reversed(found) if r.get("correct") is mark}  # one a task
            result += [card(r) for r in list(task_of.values())[:-3:-1]]
    return "".join(result) or missing("completions", "Add the Completions callback, which writes completions.jsonl.")


def card(r: dict[str, Any]) -> str:
    correct = r.get("correct")
    mark = "right" if correct is True else "wrong" if correct is False else "not judged"
    badge = f'<span class="badge {mark}">{mark}</span>'
    about = [r.get("family"), f"reward {show(r.get('reward'))}", f"advantage {show(r.get('advantage'), '+.3g')}"]
    about += [f"{key} {r[key]}" for key in ("tokens", "answer", "reason") if r.get(key)]
    said = escape(" · ".join(str(fact) for fact in about if fact))
    texts = [f'<p class="dim">{key}</p>{fold(str(r.get(key) or ""))}' for key in ("prompt", "response")]
    return f'<div class="card">{badge}<span class="dim">{said}</span>{"".join(texts)}</div>'


def fold(text: str) -> str:
    """Text that no one wrote for a page: escaped, and long text folded behind its beginning."""
    whole = f'<div class="text">{escape(text)}</div>'
    if len(text) <= FOLDED and text.count("\n") <= 12:
        return whole
    start = f'<span class="start text">{escape(text[: FOLDED // 2])}… </span>'
    return f'<details><summary>{start}<span class="dim">all {len(text):,} characters</span></summary>{whole}</details>'
