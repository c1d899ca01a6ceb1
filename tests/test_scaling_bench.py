"""ScalingBench: its loss is a plain model's on the worked solutions, and its forecast is the fit of earlier runs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import run
from test_policy import trainer
from test_resume import policy
from torch.nn.functional import cross_entropy

from lit_rl import GRPO, SFT, Pretrain, Task, jsonl
from lit_rl.callbacks import ScalingBench
from lit_rl.datamodules.base import TaskData
from lit_rl.encoding import tiny_tokenizer
from lit_rl.laws import LOSS, scaling_points, sigmoid_fit
from lit_rl.run import RunLogger


class Two(TaskData):
    def tasks(self, split):
        right = lambda text: float("e" in text)  # noqa: E731
        return [Task("ab", right, ["cd<answer>1</answer>", "e"]), Task("fgh", right, ["i"]), Task("j", right)]


@pytest.mark.parametrize("method", [SFT, GRPO, Pretrain])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_loss_is_of_the_solutions_given_their_prompts(method, batch):
    module, tokenizer = policy(method, microbatch_tokens=20), tiny_tokenizer()
    loop = trainer(logger=RunLogger("r"), callbacks=[ScalingBench()], limit_val_batches=1.0)
    loop.validate(module, Two(1, eval_batch_size=batch), verbose=False)
    losses, count = 0.0, 0
    for task in Two(1).tasks("validation"):
        for text in task.responses:
            prompt = tokenizer(task.prompt + "\n")["input_ids"]
            ids = torch.tensor([[*prompt, *tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            losses += cross_entropy(
                module.model(ids).logits[0, len(prompt) - 1 : -1], ids[0, len(prompt) :], reduction="sum"
            )
            count += ids.shape[1] - len(prompt)
    metrics = loop.callback_metrics
    assert float(metrics[LOSS]) == pytest.approx(float(losses.detach()) / count, rel=1e-5)
    assert scaling_points(["r"]) == [(pytest.approx(float(metrics[LOSS])), float(metrics["val/pass@1"]))]


def runs(n=3):
    """Folders of runs, whose scores follow a curve with some noise."""
    random = np.random.default_rng(0)
    for i in range(n):
        rows = [{"step": 0, "loss": 3.0}]
        for step in range(5):
            loss = random.uniform(0.5, 2.5)
            score = 0.8 / (1 + math.exp(4 * (loss - 1.2))) + random.normal(0, 0.01)
            rows.append({"step": step, LOSS: loss, "val/pass@1": score})
        Path(f"run{i}").mkdir()
        jsonl.append(Path(f"run{i}/metrics.jsonl"), rows)
    return [f"run{i}" for i in range(n)]


def test_the_forecast_is_the_fit_of_earlier_runs():
    folders = runs()
    loop = trainer(callbacks=[ScalingBench(folders)], limit_val_batches=1.0)
    loop.validate(policy(SFT), Two(1), verbose=False)
    found, law = {k: float(v) for k, v in loop.callback_metrics.items()}, sigmoid_fit(scaling_points(folders))
    assert abs(law.middle - 1.2) < 0.1
    assert found["val/scaling_predicted"] == pytest.approx(law(found[LOSS]), rel=1e-4)
    assert found["val/scaling_interval"] == pytest.approx(law.interval(found[LOSS], new=True), rel=1e-4)


def test_runs_that_say_nothing_are_named(capsys):
    with pytest.raises(FileNotFoundError, match="nowhere holds no validation with val/scaling_loss"):
        ScalingBench(["nowhere"])
    with pytest.raises(ValueError, match="needs 6 points with a loss and a score, and has 5"):
        ScalingBench(runs(1))
    more = ("--trainer.callbacks+=ScalingBench", "--trainer.callbacks.runs", "[run0]", "--trainer.max_steps", 1)
    code, text = run(capsys, "fit", "--config", "sft", "--config", "tiny", *more, "--run", "r")
    assert code
    assert "needs 6 points" in text
