"""Warm-starts the tiny model on worked solutions, trains it by GRPO, and shows what it learned on held-out tasks.

It is also the Python way in: policies and DataModules in an ordinary Lightning Trainer.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
import transformers

from lit_rl import GRPO, SFT, Sampling
from lit_rl.callbacks import Completions, EntropyMonitor, RolloutStats
from lit_rl.datamodules import Bootcamp
from lit_rl.report import write_report
from lit_rl.run import RunLogger

FAMILIES = {"spell-backwards": 2.0, "sort-numbers": 1.0, "largest-number-from-parts": 0.7, "bubble-passes": 1.2}
"""With weights for training, so that the warm start half learns each; held-out tasks are as many of each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="made anew")
    parser.add_argument("--warm-steps", type=int, default=160)
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    transformers.logging.disable_progress_bar()
    if args.run.exists():
        shutil.rmtree(args.run)
    L.seed_everything(args.seed, verbose=False)

    def trainer(steps: int, folder: Path, validate: bool, callbacks: list[L.Callback]) -> L.Trainer:
        return L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            gradient_clip_val=1.0,
            logger=RunLogger(str(folder)),
            callbacks=callbacks,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            val_check_interval=50,
            num_sanity_val_steps=0,
            limit_val_batches=1.0 if validate else 0,
        )

    print(f"1. warm start: {args.warm_steps} steps of SFT on worked solutions of {', '.join(FAMILIES)}")
    start = time.perf_counter()
    data = {"families": FAMILIES, "level": 0, "val_size": 100, "test_size": 400, "seed": args.seed, "hint": False}
    warm = SFT("tiny", lr=2e-3, schedule="cosine", warmup_steps=10, microbatch_tokens=2048)
    trainer(args.warm_steps, args.run / "warm", False, []).fit(warm, Bootcamp(**data, batch_size=32))
    warm.export(args.run / "warm" / "model")
    print(f"   {time.perf_counter() - start:.0f} s")

    policy = GRPO(
        str(args.run / "warm" / "model"),
        advantage="dr_grpo",
        aggregate="token",
        kl_coef=0.0,
        lr=3e-4,
        schedule="linear",
        warmup_steps=10,
        sampling=Sampling(max_new_tokens=40, temperature=1.4),  # above that of evaluation, to keep exploring
        microbatch_tokens=4096,
        eval_samples=4,
        eval_temperature=1.0,
    )
    rl = trainer(args.steps, args.run, True, [EntropyMonitor(), RolloutStats(), Completions()])
    bootcamp = Bootcamp(**data, batch_size=32, eval_batch_size=200)
    print("2. held-out tasks before reinforcement learning")
    rl.test(policy, bootcamp, verbose=False)
    before = policy.table

    print(f"3. reinforcement learning: {args.steps} steps of GRPO")
    start = time.perf_counter()
    rl.fit(policy, bootcamp)
    seconds = time.perf_counter() - start
    print(f"   {seconds:.0f} s")

    print("4. the same held-out tasks after it")
    rl.test(policy, bootcamp, verbose=False)
    after = policy.table
    policy.export(args.run / "model")

    summary = {
        "before": before.as_dict(),
        "after": after.as_dict(),
        "seed": args.seed,
        "train_seconds": round(seconds, 1),
    }
    (args.run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    report = write_report(args.run)
    gain = after.as_dict()["mean"] - before.as_dict()["mean"]
    print(f"mean held-out pass@1: {before.as_dict()['mean']:.3f} -> {after.as_dict()['mean']:.3f} ({gain:+.3f})")
    print(f"{args.run / 'summary.json'} holds the numbers, {report} the curves and sample completions")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
