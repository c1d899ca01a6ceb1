"""The commands beside LightningCLI's: recipes, bootcamp, export, report, tunnel."""

from __future__ import annotations

import argparse
import importlib.resources
import importlib.util
from collections.abc import Callable
from pathlib import Path

HELP = """\
lit-rl COMMAND: reinforcement learning for LLM reasoning

  fit        trains: lit-rl fit --config grpo --config tiny
  test       evaluates on held-out tasks: lit-rl test --config runs/grpo-1/config.yaml --ckpt_path last
  validate   does so on those that fit looks at
  predict    writes responses to predictions.jsonl
  recipes    lists what --config finds by name, or prints one
  bootcamp   lists, shows and checks families of tasks
  export     makes a Hugging Face folder of a checkpoint
  report     makes one HTML page of a run
  tunnel     searches options on narrow models, and runs wide ones with the best

Each has --help. The options of a class: lit-rl fit --model.help GRPO, --data.help Bootcamp, --trainer.callbacks.help ClipCov.
"""
OVERLAY = "An overlay: "
"""How a recipe begins that goes after others."""


def recipe_paths() -> dict[str, Path]:
    """The shipped recipes by name."""
    folder = Path(str(importlib.resources.files("lit_rl.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipes(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("lit-rl recipes", description="Lists the recipes that --config finds by name.")
    parser.add_argument("name", nargs="?", help="print this recipe")
    name = parser.parse_args(argv).name
    if name is None:
        about = {stem: path.read_text().splitlines()[0].lstrip("# ") for stem, path in recipe_paths().items()}
        overlays = {stem: text.removeprefix(OVERLAY) for stem, text in about.items() if text.startswith(OVERLAY)}
        for stem, text in about.items():
            if stem not in overlays:
                print(f"{stem:24} {text}")
        print("\nOverlays, to put after any of these:")
        for stem, text in overlays.items():
            print(f"{stem:24} {text}")
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


def tunnel(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "lit-rl tunnel",
        description="Searches options on narrow models, and runs wide ones with the best. Started again, it goes on.",
        epilog="What follows -- is that of lit-rl fit: lit-rl tunnel runs/tunnel --search model.lr=1e-3:1e-1:log --narrow tiny:64"
        " --wide tiny:256 -- --config pretrain --config mup --data.files '[corpus/*.txt]'",
    )
    parser.add_argument("folder", type=Path, help="of the search and its runs")
    search = (
        "an option with a range LOW:HIGH, LOW:HIGH:log, or values A,B,C; several of these; values alone are all tried"
    )
    parser.add_argument("--search", action="append", required=True, metavar="NAME=VALUES", help=search)
    parser.add_argument(
        "--narrow", nargs="+", required=True, metavar="MODEL", help="models, each with a search of its own"
    )
    parser.add_argument(
        "--wide", nargs="*", default=[], metavar="MODEL", help="run with the best of the last narrow one"
    )
    parser.add_argument("--trials", type=int, default=20, help="of each search that has a range")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one run at a time")
    parser.add_argument("--metric", default="val/loss", help="that counts: its last value in a run")
    parser.add_argument("--maximize", action="store_true", help="the highest is the best")
    own, words = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("lit-rl tunnel needs optuna: pip install 'lit-rl[tunnel]'")
    from lit_rl import tunnel as wind
    from lit_rl.cli import resolve

    resolve(["fit", *words])  # complains of unknown recipes here
    objective = wind.Fit(tuple(words), args.metric, args.maximize)
    space = dict(wind.dimension(text) for text in args.search)
    found = wind.tunnel(objective, space, args.folder, args.narrow, args.wide, args.trials, args.jobs)
    for model, trials in found.items():
        options, value = trials[0]
        said = " ".join(f"{name}={value}" for name, value in options.items() if name != "model.model")
        print(f"{model:24} {args.metric} {-value if args.maximize else value:.5g}  {said}  (of {len(trials)})")
    print(f"lit-rl fit --config {args.folder / wind.BEST} has the best options")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "recipes": recipes,
    "bootcamp": bootcamp,
    "export": export,
    "report": report,
    "tunnel": tunnel,
}
