"""The page of a run: what is drawn and tabled is what the files hold, and what a model wrote stays text."""

import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lit_rl.charts import smooth, thin, ticks
from lit_rl.report import write_report

EVIL = "</div></details><script>alert(1)</script><img src=x onerror=alert(1)>&amp;"


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))


def row(family: str, pass_at: dict[int, float], interval: float, **other: Any) -> dict[str, Any]:
    return {"family": family, "items": 40, "samples": 4, "pass_at": pass_at, "interval": interval} | {
        "majority": 0.5,
        "length": 20.0,
        "score": 0.5,
        **other,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines(
        tmp_path / "metrics.jsonl",
        [
            {"step": s, "epoch": 0, "reward": s / 20, "loss": 0.07 - s / 50, "reward/a": 0.25, "reward/b<": 0.5}
            for s in range(11)
        ]
        + [{"step": 4, "val/pass@1": 0.1, "val/maj@4": 0.2}, {"step": 9, "val/pass@1": 0.3, "val/maj@4": 0.4}],
    )
    before = [row("add", {1: 0.25, 4: 0.5}, 0.03), row("mean", {1: 0.25, 4: 0.5}, 0.03)]
    after = [row("add", {1: 0.75, 4: 0.875}, 0.04, length=31.4), row("mean", {1: 0.75, 4: 0.875}, 0.04)]
    lines(
        tmp_path / "evaluations.jsonl",
        [
            {"stage": "test", "step": 0, "rows": before},
            {"stage": "val", "step": 5, "rows": [row("mean", {1: math.nan}, math.inf, samples=1)]},
            {"stage": "test", "step": 5, "rows": before},
            {"stage": "test", "step": 10, "rows": after},
        ],
    )
    sample = {"family": "add", "task": "t", "prompt": EVIL, "reward": 1.0, "advantage": -0.5, "tokens": 7}
    texts = [(0, True, EVIL), (0, False, "wrong one"), (5, True, "in between"), (10, None, EVIL * 20)]
    lines(tmp_path / "completions.jsonl", [{**sample, "step": s, "correct": c, "response": t} for s, c, t in texts])
    (tmp_path / "config.yaml").write_text(
        "seed_everything: 7\ntrainer: {max_steps: 11}\n"
        "model: {class_path: lit_rl.GRPO, init_args: {model: tiny, lr: 1.0e-06, seed: null}}\n"
    )
    return tmp_path


def page(run: Path) -> str:
    return write_report(run).read_text()


def chart(text: str, title: str) -> str:
    return next(f for f in re.findall(r"<figure>.*?</figure>", text, re.S) if f"<figcaption>{title} " in f)


def drawn(figure: str) -> list[list[tuple[float, float]]]:
    """Each polyline in the chart's own units, by way of the labels on its axes."""

    def scale(axis: str) -> tuple[float, float, float]:
        found = re.findall(rf'<text class="{axis}"[^>]* x="([\d.]+)" y="([\d.]+)">([^<]+)<', figure)
        pixels = [float(x) if axis == "x" else float(y) - 4 for x, y, _ in found]
        values = [float(label.replace("−", "-")) for *_, label in found]
        return pixels[0], values[0], (values[-1] - values[0]) / (pixels[-1] - pixels[0])

    (x0, s0, dx), (y0, v0, dy) = scale("x"), scale("y")
    assert 15 <= float(re.findall(r'<text class="x"[^>]* y="([\d.]+)"', figure)[0]) - y0 <= 20  # the axes meet
    points = [
        [tuple(map(float, p.split(","))) for p in text.split()] for text in re.findall(r'points="([^"]+)"', figure)
    ]
    return [[(s0 + (x - x0) * dx, v0 + (y - y0) * dy) for x, y in line[1:]] for line in points]


def test_the_curves_hold_the_numbers(run: Path) -> None:
    text = page(run)
    (reward,) = drawn(chart(text, "Reward"))
    assert len(reward) == 11
    assert reward[6] == pytest.approx((6, 0.3), abs=0.02)
    (loss,) = drawn(chart(text, "Loss"))
    assert loss[10] == pytest.approx((10, -0.13), abs=0.01)
    pass_at_1, majority = drawn(chart(text, "Validation"))
    assert pass_at_1[1] == pytest.approx((9, 0.3), abs=0.02)
    assert majority[0] == pytest.approx((4, 0.2), abs=0.02)
    assert "b&lt;, last 0.5" in chart(text, "reward")
    assert "Add the EntropyMonitor callback" in text


def test_long_curves_are_smoothed_and_thinned(run: Path) -> None:
    lines(run / "metrics.jsonl", [{"step": s, "reward": 1.0 if s == 4321 else s % 2 / 2} for s in range(5000)])
    raw, average = drawn(chart(page(run), "Reward"))
    assert len(raw) <= 600
    assert max(v for _, v in raw) == pytest.approx(1, abs=0.02)  # a spike is never thinned away
    assert average[-1][1] == pytest.approx(0.25, abs=0.02)
    assert smooth([(s, 3.0) for s in range(40)]) == [(s, pytest.approx(3.0)) for s in range(40)]
    assert thin([(0, 1.0), (1, 2.0)]) == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.83), (-0.07, 0.02), (0, 3e-7), (-5, 0), (0, 41234), (3, 1e30)])
def test_ticks_enclose_the_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-9
    assert found[-1] >= high * (1 - 1e-9)
    assert 3 <= len(found) <= 9


def test_values_that_are_not_finite_break_the_line(run: Path) -> None:
    values = [0.5, math.nan, 0.25, math.inf, 0.75, 0.5]
    lines(run / "metrics.jsonl", [{"step": s, "reward": v, "loss": math.nan} for s, v in enumerate(values)])
    text = page(run)
    assert [len(line) for line in drawn(chart(text, "Reward"))] == [1, 1, 2]
    assert "Not drawn: 2 NaN or infinite" in chart(text, "Reward")
    assert "Not drawn: 6 NaN or infinite" in chart(text, "Loss")
    assert not re.search("nan|inf[^i]", chart(text, "Reward") + chart(text, "Loss"))


@pytest.mark.parametrize("step", [0, 9])
def test_a_later_validation_is_no_part_of_the_curve(step: int, run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {step}, "val/pass@1": 0.9, "test/pass@1": 0.9}}\n{{"step": 11, "rew')
    figure = chart(page(run), "Validation")
    assert [len(line) for line in drawn(figure)] == [2, 2]
    assert "pass@1, last 0.3<" in figure


def test_before_and_after(run: Path) -> None:
    text = page(run)
    heads = re.findall(r'<th scope="col">(.*?)</th>', text)
    assert heads[:8] == [
        "family",
        "tasks",
        "pass@1, step 0",
        "pass@1, step 10",
        "difference",
        "pass@4",
        "maj@4",
        "tokens",
    ]
    add = next(r for r in re.findall(r"<tr>.*?</tr>", text) if ">add<" in r)
    assert re.findall(r"<td>(.*?)</td>", add) == [
        "40",
        "0.250 ± 0.030",
        "0.750 ± 0.040",
        "+0.500 ± 0.050",
        "0.500 → 0.875",
        "0.500 → 0.500",
        "20 → 31",
    ]
    only = text[text.index("<h3>Validation</h3>") :]  # one evaluation: no before, and NaN and infinity have a sign
    assert "<td>– ± ∞</td>" in only
    assert "difference" not in only[: only.index("</table>")]


def test_families_that_differ_are_pointed_out(run: Path) -> None:
    sides = [[row(name, {1: 0.5}, 0.1), row("mean", {1: 0.5}, 0.1)] for name in "ab"]
    lines(run / "evaluations.jsonl", [{"stage": "val", "step": i, "rows": rows} for i, rows in enumerate(sides)])
    text = page(run)
    assert "The families differ" in text
    assert "<td>0.500 ± 0.100</td><td>– ± –</td><td>– ± –</td>" in text


class Tags(HTMLParser):
    """Every tag and attribute, and whether the tags close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_what_a_model_wrote_stays_text(run: Path) -> None:
    text = page(run)
    tags = Tags(text)
    assert not tags.open
    assert not tags.tags & {"script", "img", "link", "iframe"}
    assert not {a for a in tags.attributes if a.startswith("on")} | tags.attributes & {"src", "href"}
    assert "&lt;/div&gt;&lt;/details&gt;&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "&amp;amp;" in text
    assert [m in text for m in (">right<", ">wrong<", ">not judged<", "wrong one", "in between")] == [True] * 4 + [
        False
    ]
    assert "advantage −0.5" in text
    assert f"all {len(EVIL * 20):,} characters" in text


def test_the_page_is_self_contained(run: Path) -> None:
    lines(run / "completions.jsonl", [])
    text = page(run)
    assert not re.search(r"https?://|src=|@import|url\(", text)
    assert "<title>GRPO on tiny</title>" in text
    assert "<dt>Steps</dt><dd>11 of 11</dd>" in text
    assert "<dt>Seed</dt><dd>7</dd>" in text


def test_missing_files_say_how_to_get_them(run: Path) -> None:
    for name in ("metrics.jsonl", "completions.jsonl", "config.yaml"):
        (run / name).unlink()
    text = page(run)
    assert "No metrics." in text
    assert "Add the Completions callback" in text
    assert f"<h1>{run.name}</h1>" in text
    lines(run / "metrics.jsonl", [{"step": 0, "reward": 1.0}])
    (run / "evaluations.jsonl").unlink()
    (run / "config.yaml").write_text("a: [")
    assert "No evaluations." in page(run)


def test_the_file_of_csv_logger(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.csv").write_text("epoch,reward,step,val/pass@1\n0,0.5,0,\n0,0.25,10,\n0,,10,0.75\n")
    text = page(run)
    assert drawn(chart(text, "Reward"))[0] == [pytest.approx((0, 0.5), abs=0.02), pytest.approx((10, 0.25), abs=0.02)]
    assert "pass@1, last 0.75" in text


def test_a_folder_without_a_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        write_report(tmp_path / "nowhere")
    inner = shutil.copytree(run, tmp_path / "outer" / "r")
    with pytest.raises(FileNotFoundError, match=re.escape(str(inner))):
        write_report(inner.parent)
    assert write_report(run, run / "deep" / "page.html") == run / "deep" / "page.html"


def test_it_needs_no_torch() -> None:
    code = "import sys, lit_rl.report; sys.exit(bool({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
