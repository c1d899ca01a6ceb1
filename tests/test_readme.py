"""The README's code runs, and what it names exists."""

import gc
import re
import shlex
from pathlib import Path

import pytest

from lit_rl.commands import COMMANDS, recipe_paths

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [
    line.split("#")[0] for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code, capsys):
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    gc.collect()  # its classes are not to be found by the command line


def test_there_are_blocks_for_each_way_in():
    assert len(PYTHON) == 3
    assert len([line for line in SHELL if line.startswith("lit-rl fit")]) >= 3


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("lit-rl ")])
def test_commands_parse(line, monkeypatch, capsys):
    """Every command line is accepted by its parser; none is run."""
    words = shlex.split(line)[1:]
    if words[0] in COMMANDS:
        return
    from lit_rl import cli

    Path("checkpoints").mkdir()
    for name in ("instantiate_classes", "_run_subcommand"):
        monkeypatch.setattr(cli.CLI, name, lambda *a, **k: None)
    assert cli.run_cli(cli.resolve(words)).config[words[0]]


def test_recipes_are_named():
    for name in recipe_paths():
        assert re.search(rf"\b{name}\b", README), name


def test_the_tests_that_keep_promises_are_there():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "promises.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)
