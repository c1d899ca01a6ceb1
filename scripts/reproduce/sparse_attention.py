"""InfLLM-v2 (MiniCPM4, arXiv 2506.07900 and 2509.24663). Claim: a model that was trained with dense attention on short
sequences, and a little with block-sparse attention on longer ones, retrieves as dense attention does, where a sliding window
over as many tokens fails. Values of several kinds lie at random places in noise; at the end the kinds are asked for."""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
from common import Record, curves, folder_of, jsonl, options, plot, save, table, trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from lit_rl.callbacks import SparseAttention
from lit_rl.kernels.infllm import Settings
from lit_rl.run import METRICS

NAME = "sparse_attention"
SHORT, LONG, LONGER = 64, 256, 512
"""Tokens of the warm start, of adapting and testing, and of a test beyond."""
BLOCKS = Settings(kernel_size=4, kernel_stride=2, block_size=8, window_size=16, topk=6, dense_len=-1)
"""A query sees 8 blocks, 64 tokens: a quarter of LONG."""
KINDS, VALUES, NOISE = 4, 8, 16
VOCABULARY = KINDS * (1 + VALUES) + NOISE


def sequences(rows: int, length: int, numbers: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (rows, length) and labels, which are -100 but at the answers."""
    body = length - 2 * KINDS
    x = torch.randint(KINDS * (1 + VALUES), VOCABULARY, (rows, body), generator=numbers)
    values = KINDS + torch.arange(KINDS) * VALUES + torch.randint(VALUES, (rows, KINDS), generator=numbers)
    x.scatter_(1, torch.rand(rows, body, generator=numbers).argsort(1)[:, :KINDS], values)
    order = torch.rand(rows, KINDS, generator=numbers).argsort(1)
    x = torch.cat([x, torch.stack([order, values.gather(1, order)], 2).flatten(1)], 1)
    labels = torch.full_like(x, -100)
    labels[:, body + 1 :: 2] = x[:, body + 1 :: 2]
    return x, labels


class Sequences(IterableDataset):
    def __init__(self, rows: int, length: int, seed: int, batches: int) -> None:
        self.arguments, self.seed, self.batches = (rows, length), seed, batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        numbers = torch.Generator().manual_seed(self.seed)
        for _ in range(self.batches):
            yield sequences(*self.arguments, numbers)


class Retrieval(L.LightningModule):
    """A Llama of two layers that learns the answers."""

    def __init__(self, lm: LlamaForCausalLM, lr: float) -> None:
        super().__init__()
        self.lm, self.lr = lm.train(), lr

    def answers(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, labels = batch
        at = labels[:, 1:] != -100
        logits = self.lm(input_ids=x, use_cache=False).logits[:, :-1][at]
        right = labels[:, 1:][at]
        return torch.nn.functional.cross_entropy(logits, right), (logits.argmax(-1) == right).float().mean()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss, accuracy = self.answers(batch)
        self.log("accuracy", accuracy)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], index: int, dataloader_idx: int = 0) -> None:
        self.log("right", self.answers(batch)[1], batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


def sliding(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
    """The last tokens, as many as are in the blocks."""
    length, window = key.shape[2], BLOCKS.blocks * BLOCKS.block_size
    seen = torch.ones(length, length, dtype=torch.bool).tril().triu(1 - window)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("sliding", sliding)
ARMS: dict[str, tuple[str, list[Callback]]] = {
    "dense": ("sdpa", []),
    "InfLLM-v2": ("sdpa", [SparseAttention(BLOCKS, every_n_steps=5)]),
    "sliding window": ("sliding", []),
}


def warm_start(args: Any, seed: int) -> LlamaForCausalLM:
    L.seed_everything(seed, verbose=False)
    lm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.06,
        )
    )  # fmt: skip
    data = DataLoader(Sequences(2 * args.batch, SHORT, seed, args.warm_steps), batch_size=None)
    folder = folder_of(args, NAME, "warm", seed)
    shutil.rmtree(folder, ignore_errors=True)
    trainer(args, args.warm_steps, folder).fit(Retrieval(lm, 3e-3), data)
    return lm


def run(args: Any, arm: str, start: LlamaForCausalLM, seed: int, steps: int) -> Record:
    begin, folder = time.process_time(), folder_of(args, NAME, arm, seed)
    shutil.rmtree(folder, ignore_errors=True)
    lm = copy.deepcopy(start)
    attention, callbacks = ARMS[arm]
    lm.set_attn_implementation(attention)
    module, callbacks = Retrieval(lm, 1e-3), copy.deepcopy(callbacks)
    if steps:
        data = DataLoader(Sequences(args.batch, LONG, seed + 1000, steps), batch_size=None)
        trainer(args, steps, folder, callbacks).fit(module, data)
    test: dict[str, float] = {}
    for name, length in {"pass@1": LONG, f"at {LONGER}": LONGER}.items():
        data = DataLoader(Sequences(50, length, seed + 2000, max(1, args.tasks // 50)), batch_size=None)
        (found,) = trainer(args, 0, folder / "test", callbacks).test(module, data, verbose=False)
        test[name] = round(found["right"], 4)
    logged: dict[str, list[list[float]]] = {}
    for row in jsonl.read(folder / METRICS):
        for metric, value in row.items():
            logged.setdefault(metric, []).append([row["step"], float(f"{value:.4g}")])
    print(f"{arm}, seed {seed}, {steps} steps: {test}", flush=True)
    label = arm if steps else f"{arm}, not adapted"
    return {"arm": label, "seed": seed, "test": test, "curves": logged, "cpu_seconds": time.process_time() - begin}


def tables(records: list[Record]) -> str:
    return table(
        records,
        {
            f"right at {LONG} tokens": lambda r: r["test"]["pass@1"],
            f"at {LONGER}": lambda r: r["test"][f"at {LONGER}"],
            "recall of dense attention's mass, last": lambda r: r["curves"]["sparse_attention/recall"][-1][1],
        },
    )


def main() -> None:
    args = options(__doc__, steps=60, warm_steps=200)
    records = []
    for seed in args.seeds:
        start = warm_start(args, seed)
        records += [run(args, arm, start, seed, steps) for steps in (0, args.steps) for arm in ARMS]
    save(args, NAME, records, ("accuracy", "sparse_attention/recall"))
    print(tables(records))
    adapted = [r for r in records if "not adapted" not in r["arm"]]
    panels = {f"Right answers in training, {LONG} tokens": curves(adapted, "accuracy")}
    plot(
        args.out / f"{NAME}.svg",
        panels | {"Recall of dense attention's mass": curves(adapted, "sparse_attention/recall")},
    )


if __name__ == "__main__":
    main()
