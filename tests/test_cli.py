"""End to end through the command line, as users do."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lit_rl import jsonl
from lit_rl.__main__ import main
from lit_rl.commands import COMMANDS, recipe_paths

OVERLAYS = {name for name, path in recipe_paths().items() if path.read_text().startswith("# An overlay")}
IMITATE = "sft", "ternary", "pretrain", "coordinate_check", "scaling_bench"
"""Recipes without responses in training."""
RECIPES = [[name] for name in recipe_paths() if name not in OVERLAYS] + [
    ["grpo", name] for name in sorted(OVERLAYS - {"tiny", *(["vllm"] if find_spec("vllm") is None else [])})
]


def run(capsys, *argv):
    """Runs in this process; returns what was printed, whether it ended well or not."""
    try:
        main([str(a) for a in argv])
        code = 0
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out + out.err + (code if isinstance(code, str) else "")


def fit(capsys, *argv):
    code, text = run(capsys, "fit", *argv, "--trainer.enable_progress_bar", "false")
    assert code == 0, text
    return text


@pytest.mark.parametrize("recipes", RECIPES, ids="-".join)
def test_every_recipe_runs_with_the_tiny_overlay(recipes, capsys):
    fit(
        capsys,
        *(word for name in (*recipes, "tiny") for word in ("--config", name)),
        "--trainer.max_steps",
        2,
        "--run",
        "r",
    )
    steps = [r for r in jsonl.read(Path("r/metrics.jsonl")) if "loss" in r]
    assert len(steps) == 2
    assert (recipes[0] in IMITATE) != Path("r/completions.jsonl").exists()
    assert Path("r/checkpoints/last.ckpt").exists()
    assert Path("r/config.yaml").exists()


def test_resume_validate_export_and_report(capsys):
    args = ("--config", "grpo", "--config", "tiny", "--trainer.callbacks.every_n_train_steps", 1)
    fit(capsys, *args, "--trainer.max_steps", 4, "--run", "straight")
    fit(capsys, *args, "--trainer.max_steps", 2, "--run", "stopped")
    fit(capsys, *args, "--trainer.max_steps", 4, "--run", "stopped", "--ckpt_path", "last")
    a, b = (torch.load(f"{r}/checkpoints/last.ckpt", weights_only=True) for r in ("straight", "stopped"))
    assert all(torch.equal(v, b["state_dict"][k]) for k, v in a["state_dict"].items())
    assert Path("straight/completions.jsonl").read_text() == Path("stopped/completions.jsonl").read_text()
    losses = [
        [r["loss"] for r in jsonl.read(Path(f"{name}/metrics.jsonl")) if "loss" in r]
        for name in ("straight", "stopped")
    ]
    assert losses[0] == losses[1]

    code, text = run(
        capsys,
        "validate",
        "--config",
        "straight/config.yaml",
        "--ckpt_path",
        "straight/checkpoints/last.ckpt",
        "--run",
        "straight",
    )
    assert code == 0, text
    assert "vowels" in text
    assert "pass@1" in text
    assert jsonl.read(Path("straight/evaluations.jsonl"))[-1]["stage"] == "val"
    assert Path("straight/config_validate.yaml").exists()
    assert "straight holds checkpoints, completions.jsonl, config.yaml, config_validate.yaml" in text

    code, text = run(capsys, "export", "straight/checkpoints/last.ckpt", "exported")
    assert code == 0, text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained("exported"), AutoTokenizer.from_pretrained("exported")
    assert torch.equal(model.lm_head.weight, a["state_dict"]["model.lm_head.weight"])
    assert tokenizer.decode(tokenizer("<answer>7</answer>")["input_ids"]) == "<answer>7</answer>"

    code, text = run(capsys, "report", "straight")
    assert code == 0, text
    assert "<svg" in Path("straight/report.html").read_text()


def test_a_checkpoint_is_evaluated_at_its_step(capsys):
    """As a validation of the fit after that step: with its epoch, too. A run that goes on keeps the record."""
    args = ("--config", "grpo", "--config", "tiny", "--trainer.val_check_interval", 2, "--run", "r")
    args += ("--trainer.limit_train_batches", 2, "--trainer.callbacks.every_n_train_steps", 2)
    args += ("--trainer.callbacks.save_top_k", -1)
    fit(capsys, *args, "--trainer.max_steps", 4)
    for command in ("validate", "test"):
        for saved in ("r/checkpoints/epoch=0-step=2.ckpt", "last"):
            csv = ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", f"{command}-{Path(saved).stem}")
            code, text = run(capsys, command, *args, *csv, "--ckpt_path", saved)
            assert code == 0, text

    def at(stage):
        rows = [r for r in jsonl.read(Path("r/metrics.jsonl")) if f"{stage}/pass@1" in r]
        return [(r["step"], r["epoch"], r[f"{stage}/pass@1"]) for r in rows]

    val, test = at("val"), at("test")
    assert [one[:2] for one in val] == [(1, 0), (3, 1)] * 2
    assert [one[:2] for one in test] == [(1, 0), (3, 1)]
    assert val[:2] == val[2:]
    evaluations = [(e["stage"], e["step"]) for e in jsonl.read(Path("r/evaluations.jsonl"))]
    assert evaluations == [("val", 2), ("val", 4)] * 2 + [("test", 2), ("test", 4)]
    for path in Path().rglob("metrics.csv"):
        names, values = (line.split(",") for line in path.read_text().splitlines())
        assert values[names.index("step")] == ("3" if "last" in str(path) else "1")
    run(capsys, "report", "r")
    assert "pass@1, step 2" in Path("r/report.html").read_text()
    fit(capsys, *args, "--trainer.max_steps", 5, "--ckpt_path", "last")
    assert at("test") == test


def test_a_folder_that_holds_a_run_is_refused(capsys):
    args = ("--config", "grpo", "--config", "tiny", "--trainer.max_steps", 1, "--run", "r")
    fit(capsys, *args)
    before = Path("r/metrics.jsonl").read_text()
    code, text = run(capsys, "fit", *args)
    assert code
    assert "already holds another run" in text
    assert "--ckpt_path last" in text
    assert Path("r/metrics.jsonl").read_text() == before


def test_runs_without_a_name_get_their_own_folders(capsys):
    for _ in range(2):
        fit(capsys, "--config", "rloo", "--config", "tiny", "--trainer.fast_dev_run", "true")
        fit(capsys, "--config", "rloo", "--config", "tiny", "--trainer.max_steps", 1)
    assert sorted(p.name for p in Path("runs").iterdir()) == ["rloo-1", "rloo-2"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["fit", "--config", "gropo"], "no recipe 'gropo': did you mean grpo"),
        (["fti"], "no command 'fti': did you mean fit"),
        (["fit", "--config", "grpo", "--model", "DAPPO"], "Did you mean DAPO instead of DAPPO?"),
        (
            ["fit", "--config", "grpo", "--data", "Prompts", "--data.train", "a: b"],
            "A text with a colon is read as YAML here: give it in a file",
        ),
        (["fit", "--config", "grpo", "--model.gruop", "4"], "Did you mean group instead of gruop?"),
        (["fit", "--config", "grpo", "--data", "Botcamp"], "Did you mean Bootcamp instead of Botcamp?"),
        (
            ["fit", "--config", "grpo", "--trainer.callbacks+=EntropyMonitr"],
            "Did you mean EntropyMonitor instead of EntropyMonitr?",
        ),
        (["fit", "--config", "cispo", "--config", "tiny", "--model.cap", "0.2"], "cap is 0.2: it must be at least 1"),
        (["fit", "--config", "grpo", "--config", "tiny", "--model.model", "tinny"], "did you mean 'tiny'"),
        (
            ["fit", "--config", "grpo", "--config", "tiny", "--data", "Bootcamp", "--data.families", "[add-colums]"],
            "did you mean add-columns",
        ),
        (["fit", "--config", "grpo", "--config", "tiny", "--data", "Bootcamp", "--data.level", "12"], "levels 0 to 9"),
        (["fit", "--config", "grpo", "--config", "tiny", "--model.sampling.top_p", "1.5"], "top_p is 1.5"),
        (["fit"], "No method is chosen"),
        (["fit", "--config", "tiny"], "No method is chosen"),
        (
            ["fit", "--config", "grpo", "--config", "tiny", "--trainer.accumulate_grad_batches", "2"],
            "lit-rl: accumulate_grad_batches is 2",
        ),
        (["bootcamp", "show", "add-colums"], "did you mean add-columns"),
        (["bootcamp", "show", "add-columns", "--level", "77"], "has levels 0 to 9, not 77"),
        (["export", "nowhere.ckpt", "x"], "there is no checkpoint nowhere.ckpt"),
        (["report", "nowhere"], "nowhere holds no run"),
    ],
)
def test_mistakes_are_explained(argv, message, capsys):
    code, text = run(capsys, *argv)
    assert code not in (0, None)
    assert message in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("sparse_attention --model.model tiny-mistral", "MistralForCausalLM has layers of"),
        ("ternary --model.model tiny-gpt2", "TernaryQAT found no torch.nn.Linear layers"),
        ("grpo --model.ahead thread --trainer.precision bf16-true", "ahead is set: it must be null at"),
        ("grpo --data.batch_size 20000", "batch_size is 20000: it must be at most 10000"),
        ("grpo --trainer.callbacks+=BatchSizeFinder", "the callback BatchSizeFinder does not work with GRPO"),
        ("rlccf --trainer.strategy fsdp2", "RLCCF cannot shard its members (FSDP2): set the strategy to"),
        ("grpo --model.dtype float16", "the weights to train are float16"),
        (
            "sft --model.schedule cosine --trainer.max_steps -1 --trainer.max_epochs -1",
            "schedule 'cosine' needs an end",
        ),
    ],
)
def test_what_shows_only_when_all_is_set_up_is_explained_too(words, message, capsys):
    recipe, *options = words.split()
    code, text = run(capsys, "fit", "--config", recipe, "--config", "tiny", *options, "--run", "r")
    assert code.startswith(f"lit-rl: {message}")
    assert "Traceback" not in text
    assert not Path("r").exists() or not list(Path("r").iterdir())  # the folder is free for the next try


def test_a_bug_keeps_its_traceback(monkeypatch):
    Path("of_a_user.py").write_text(
        "from lit_rl import RLCallback\n"
        "class Buggy(RLCallback):\n"
        "    def setup(self, trainer, pl_module, stage):\n"
        "        a, b = ()\n"
    )
    monkeypatch.syspath_prepend(".")
    with pytest.raises(ValueError, match="not enough values to unpack"):
        main(["fit", "--config", "grpo", "--config", "tiny", "--trainer.callbacks", "of_a_user.Buggy", "--run", "r"])


def test_bootcamp_commands(capsys):
    _, text = run(capsys, "bootcamp", "list")
    assert len(text.splitlines()) >= 36
    _, text = run(capsys, "bootcamp", "show", "add-columns", "--level", 3, "--count", 2)
    assert text.count("correct=True") == 2
    assert text.count("correct=False") == 2
    code, text = run(capsys, "bootcamp", "check", "add-columns")
    assert code == 0
    assert "passes 13 of 13 gates" in text


def test_check_finds_a_bad_family_of_the_users_own(capsys):
    Path("mine.py").write_text(
        "from lit_rl.datamodules.families import Family\n"
        "from lit_rl.datamodules.families.answers import Integer\n"
        "class GuessTheBit(Family):\n"
        "    mode, answer = 'value', Integer()\n"
        "    def generate(self, rng, level): return {'n': rng.randrange(10 ** (6 + level))}\n"
        "    def prompt(self, x): return f'Is {x[\"n\"]} odd?'\n"
        "    def solve(self, x): return x['n'] % 2\n"
        "    def oracle(self, x): return int(str(x['n'])[-1]) % 2\n"
        "    def check(self, x, value): return eval(str(value)) == self.solve(x)\n"
    )
    code, text = run(capsys, "bootcamp", "check", "mine.GuessTheBit")
    assert code == 1
    assert "constants fail: the constant" in text
    assert "no code is run: mine.py uses eval" in text


def test_recipes_are_listed(capsys):
    _, text = run(capsys, "recipes")
    methods, overlays = (part.split("\n") for part in text.strip().split("\n\n"))
    assert {line.split()[0] for line in methods} == recipe_paths().keys() - OVERLAYS
    assert {line.split()[0] for line in overlays[1:]} == OVERLAYS
    _, text = run(capsys, "recipes", "dapo")
    assert "model: DAPO" in text


def test_help_names_every_command(capsys):
    for argv in ([], ["--help"]):
        code, text = run(capsys, *argv)
        assert code == 0
        assert {"fit", "validate", "test", "predict", *COMMANDS} <= {
            line.split()[0] for line in text.splitlines() if line
        }


def test_help_shows_a_method(capsys):
    _, text = run(capsys, "fit", "--model.help", "DAPO")
    assert "Replace groups whose rewards are all equal" in text
    assert "Longest completion, in tokens" in text, "attribute docstrings are help"
    assert '"smollm2-135m", a hub id' in " ".join(text.split()), "not how another class says it"
    assert "torch.nn.Identity" not in text, "what a module may be is no list to read"
    assert "as memory and batch size allow" in text, "the whole first paragraph"


def test_predict_writes_a_record_a_response(capsys):
    code, text = run(capsys, "predict", "--config", "grpo", "--config", "tiny", "--model.eval_samples", 2, "--run", "r")
    assert code == 0, text
    records = jsonl.read(Path("r/predictions.jsonl"))
    assert len(records) == 2 * 16
    assert {"task", "family", "prompt", "response", "verdict"} == records[0].keys()


def test_predictions_on_the_training_tasks_are_demonstrations(capsys):
    args = ("--config", "luffy", "--config", "tiny", "--model.sampling.stop", "[a, e, i, o, u]")
    more = (
        "--data.predict",
        "train",
        "--trainer.limit_predict_batches",
        2,
        "--model.eval_samples",
        4,
        "--run",
        "teacher",
    )
    code, text = run(capsys, "predict", *args, *more)
    assert code == 0, text
    records = jsonl.read(Path("teacher/predictions.jsonl"))
    assert {r["task"] for r in records} == {f"vowels/train/{i}" for i in range(16)}
    traces = ("--trainer.callbacks.traces", "teacher/predictions.jsonl", "--trainer.callbacks.keep_wrong", "true")
    fit(capsys, *args, *traces, "--trainer.max_steps", 3, "--run", "r")
    steps = [r for r in jsonl.read(Path("r/metrics.jsonl")) if "loss" in r]
    assert [r.get("off_policy/share") for r in steps] == [1 / 8, 1 / 8, 0]
    assert [r["skipped/no_trace"] for r in steps] == [0, 0, 8]
    given = [r for r in jsonl.read(Path("r/completions.jsonl")) if r["off_policy"]]
    assert {(r["task"], r["response"]) for r in given} <= {(r["task"], r["response"]) for r in records}
    assert len(given) == 16


def test_test_prints_a_table(capsys):
    code, text = run(
        capsys,
        "test",
        "--config",
        "grpo",
        "--config",
        "tiny",
        "--model.eval_samples",
        4,
        "--trainer.callbacks",
        "[]",
        "--run",
        "r",
    )
    assert code == 0, text
    for word in ("pass@1", "±95%", "pass@4", "maj@4", "length", "vowels", "mean"):
        assert word in text


def test_classes_of_the_working_directory_and_a_small_data_set(tmp_path):
    """As the installed command, which does not put the working directory before other modules: -P."""
    Path("mine.py").write_text(
        "from lit_rl import DrGRPO, Task\n"
        "from lit_rl.datamodules import TaskData\n"
        "class Few(TaskData):\n"
        "    def tasks(self, split):\n"
        "        return [Task(f'{i}+1=', lambda text, a=str(i + 1): a in text) for i in range(20)]\n"
        "class Plain(DrGRPO):\n"
        "    def surrogate(self, log_ratio, logps, x):\n"
        "        return -x.advantages * log_ratio, None\n"
    )
    words = "fit --config grpo --config tiny --model mine.Plain --model.group 2 --data mine.Few --trainer.max_steps 12 --run r"
    command = [sys.executable, "-P", "-m", "lit_rl", *words.split(), "--trainer.enable_progress_bar", "false"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "The run's folder: r" in done.stderr
    assert [r["step"] for r in jsonl.read(Path("r/evaluations.jsonl"))] == [10], "steps across epochs of two batches"


def test_the_module_runs_from_a_shell(tmp_path):
    done = subprocess.run([sys.executable, "-m", "lit_rl", "recipes"], capture_output=True, text=True, check=True)
    assert "grpo" in done.stdout
