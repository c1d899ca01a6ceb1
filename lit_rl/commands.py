"""The commands beside LightningCLI's: recipes, bootcamp, export, report."""

from __future__ import annotations

import argparse
import importlib.resources
from collections.abc import Callable
from pathlib import Path


def recipe_paths() -> dict[str, Path]:
    """The shipped recipes by name."""
    folder = Path(str(importlib.resources.files("lit_rl.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipes(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("lit-rl recipes", description="Lists the recipes that --config finds by name.")
    parser.add_argument("name", nargs="?", help="print this recipe")
    name = parser.parse_args(argv).name
    if name is None:
        for stem, path in recipe_paths().items():
            print(f"{stem:24} {path.read_text().splitlines()[0].lstrip('# ')}")
    else:
        from lit_rl.cli import find_recipe

        print(find_recipe(name).read_text(), end="")


def bootcamp(argv: list[str]) -> None:
    from lit_rl.datamodules.families import draw, families, family
    from lit_rl.datamodules.families.answers import wrap

    parser = argparse.ArgumentParser("lit-rl bootcamp", description="Looks at the families of verifiable tasks.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="all families, with category, mode and highest level")
    show = commands.add_parser("show", help="questions of a family, with right answers and verdicts")
    show.add_argument("family", help="a name, or the import path of your own class")
    show.add_argument("--level", type=int, default=0)
    show.add_argument("--index", type=int, default=0, help="the first question")
    show.add_argument("--count", type=int, default=1)
    show.add_argument("--split", choices=["train", "validation", "test"], default="train")
    show.add_argument("--response", help="judge this text")
    check = commands.add_parser("check", help="run the gates that every family must pass")
    check.add_argument("families", nargs="*", help="names or import paths; all when left out")
    args = parser.parse_args(argv)
    if args.command == "list":
        for name, member in families().items():
            about = (type(member).__doc__ or "").strip().splitlines()[0] if type(member).__doc__ else ""
            print(f"{name:34} {member.category:26} {member.mode:10} 0-{member.max_level}  {about}")
    elif args.command == "show":
        for i in range(args.index, args.index + args.count):
            q = draw(args.family, args.split, args.level, i)
            print(f"=== {q.id}\n{q.prompt}\n--- a worked solution: {q(q.solution)}\n{q.solution}")
            wrong = args.response if args.response is not None else wrap("0")
            print(f"--- the response {wrong!r}: {q(wrong)}")
    else:
        from lit_rl.datamodules.families.gates import check as run_gates

        failures = 0
        for name in args.families or families():
            gates = run_gates(family(name))
            failed = [gate for gate in gates if not gate.passed]
            failures += bool(failed)
            print(f"{name:34} {'passes' if not failed else 'FAILS'} {len(gates) - len(failed)} of {len(gates)} gates")
            for gate in failed:
                print(f"    {gate.name}: {gate.detail}")
        if failures:
            raise SystemExit(1)


def export(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("lit-rl export", description="Makes a Hugging Face folder of a checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--base", help="the model under a checkpoint of adapters, when it is not where it was")
    parser.add_argument("--packed", action="store_true", help="keep ternary layers in 2 bits: for lit-rl alone")
    args = parser.parse_args(argv)
    from lit_rl.export import export_checkpoint

    export_checkpoint(args.checkpoint, args.folder, overwrite=args.overwrite, base=args.base, packed=args.packed)
    print(f"{args.folder} loads with {'--model.model' if args.packed else 'transformers and vLLM'}")


def report(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("lit-rl report", description="Makes one self-contained HTML page of a run.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--out", type=Path, help="the page; RUN/report.html when left out")
    args = parser.parse_args(argv)
    from lit_rl.report import write_report

    print(write_report(args.run, args.out))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "recipes": recipes,
    "bootcamp": bootcamp,
    "export": export,
    "report": report,
}
