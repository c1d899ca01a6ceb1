"""Pre-training: the loss of a plain model on the same tokens, windows that hold every token once, splits that share no text."""

import json
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from test_cli import fit as command
from test_policy import trainer
from test_resume import Saves, left, policy
from torch.nn.functional import cross_entropy

from lit_rl import GRPO, SFT, Pretrain, Task, jsonl
from lit_rl.checks import ConfigurationError
from lit_rl.datamodules import Text
from lit_rl.datamodules.base import TaskData
from lit_rl.encoding import tiny_tokenizer
from lit_rl.run import RunLogger

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon"]


def corpus(n=60):
    """A text file and a JSONL file of documents of different lengths, some of them twice."""
    texts = [f"{WORDS[i % 5]} {i}: " + f"{WORDS[i % 3]} " * (i % 7) for i in range(n)]
    Path("a.txt").write_text("\n\n".join(texts[: n // 2]))
    Path("b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts[n // 2 :], *texts[:10]]))
    return [*texts, *texts[:10]]


def data(length=16, **settings):
    settings = {"separator": "\n\n", "held_out": 0.2, "batch_size": 4, **settings}
    return Text(["a.txt", "*.jsonl"], length, **settings)


def attached(module=None, **settings):
    """The data as a Trainer prepares it."""
    texts, module = data(**settings), module or policy(Pretrain)
    loop = trainer()
    loop.strategy.connect(module)
    texts.trainer = loop
    texts.prepare_data()
    texts.setup("fit")
    return texts


def plain_loss(model, window):
    """Mean over the window's predicted tokens, by transformers' forward."""
    ids = torch.tensor([window])
    return cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])


def test_windows_hold_every_token_once_and_splits_share_no_text():
    texts, tokenizer = corpus(), tiny_tokenizer()
    found = attached()
    documents = {}
    for split in ("train", "validation", "test"):
        windows = found.tasks(split)
        tokens = [t for task in windows for t in task.meta["tokens"][1:]]
        whole = found._tokens[split].tolist()
        assert tokens == whole[1 : 1 + len(windows) * 16]
        assert len(whole) - len(tokens) <= 16
        assert all(len(task.meta["tokens"]) == 17 for task in windows)
        documents[split] = tokenizer.decode(whole).split("<eos>")[:-1]
        with pytest.raises(IndexError):
            windows[len(windows)]
    assert sorted(text for part in documents.values() for text in part) == sorted(texts)
    sets = [set(part) for part in documents.values()]
    assert all(sets)
    assert not sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]
    assert sum(len(part) for part in documents.values()) > sum(map(len, sets)), "copies are in one split"


def test_tokens_are_made_once_for_each_tokenizer_and_text(monkeypatch):
    corpus()
    folders, made = [], []
    write = Text._write
    monkeypatch.setattr(Text, "_write", lambda self, folder: made.append(1) or write(self, folder))
    for settings in ({}, {"length": 8}, {"held_out": 0.3}, {}):
        folders.append(attached(**settings)._folder())
    assert len(made) == 2
    assert folders[0] == folders[1] == folders[3] != folders[2]
    Path("a.txt").write_text("other")
    assert attached()._folder() not in folders
    other = policy(Pretrain)
    other.tokenizer.add_tokens(["alpha"])
    assert attached(other)._folder() not in folders
    assert not list(Path("tokens").glob(".*")), "nothing unfinished is left"
    assert isinstance(attached()._tokens["train"], np.memmap)


def test_the_loss_and_gradient_are_those_of_the_plain_model():
    corpus()
    module = policy(Pretrain, microbatch_tokens=40)
    texts, seen = data(shuffle=False), []

    class Watch(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen.append(torch.cat([p.grad.flatten() for p in module.model.parameters()]))

    loop = trainer(max_steps=1, callbacks=[Watch()])
    reference = policy(Pretrain).model
    loop.fit(module, texts)
    loss = sum(plain_loss(reference, texts.tasks("train")[i].meta["tokens"]) for i in range(4)) / 4
    loss.backward()
    want = torch.cat([p.grad.flatten() for p in reference.parameters()])
    assert float(loop.callback_metrics["loss"]) == pytest.approx(loss.item(), rel=1e-5)
    assert (seen[0] - want).norm() < 1e-5 * want.norm()


def test_validation_is_the_mean_over_held_out_tokens():
    corpus()
    module, texts = policy(Pretrain), data(eval_batch_size=3)
    (got,) = trainer(limit_val_batches=1.0).validate(module, texts, verbose=False)
    losses = [plain_loss(module.model, task.meta["tokens"]).item() for task in texts.tasks("validation")]
    assert got == {"val/loss": pytest.approx(sum(losses) / len(losses), rel=1e-5)}


def test_other_tasks_are_texts_of_prompt_and_response():
    module, seen = policy(Pretrain), []

    class Two(TaskData):
        def tasks(self, split):
            return [Task("ab", lambda text: 1.0, ["cd", "e"]), Task("f", None, ["g"])]

    class Watch(L.Callback):
        def on_before_backward(self, trainer, module, loss):
            seen.append(float(loss))

    reference = policy(Pretrain).model
    loop = trainer(max_steps=1, callbacks=[Watch()], limit_val_batches=1.0)
    loop.fit(module, Two(2))
    rows = [[*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id] for text in ("ab\ncd", "ab\ne", "f\ng")]
    losses = [plain_loss(reference, row).item() * (len(row) - 1) for row in rows]
    assert sum(seen) == pytest.approx(sum(losses) / sum(len(row) - 1 for row in rows), rel=1e-5)
    assert {"val/loss", "val/pass@1"} <= loop.validate(module, Two(2), verbose=False)[0].keys()


TOKENIZER = tiny_tokenizer()


def test_it_resumes_at_every_step_of_its_windows():
    corpus()

    def fit(folder, seed=0, callbacks=(), ckpt_path=None):
        module, texts = policy(Pretrain, seed, minibatches=2), data()
        common = dict(max_steps=6, val_check_interval=2, limit_val_batches=1.0, enable_checkpointing=bool(callbacks))
        loop = trainer(logger=RunLogger(folder), log_every_n_steps=1, callbacks=[*callbacks], **common)
        loop.fit(module, texts, ckpt_path=ckpt_path)
        return [p.detach().clone() for p in module.parameters()], left(folder)

    saves = Saves({"batch_end"})
    straight, records = fit("straight", callbacks=[saves])
    for (step, _), file in saves.files.items():
        if step < 6:
            got, again = fit(f"from {step}", 1, ckpt_path=file)
            assert all(map(torch.equal, got, straight)), step
            mine, theirs = (r["metrics"].split("\n")[-1:] for r in (again, records))
            assert mine == theirs


def test_on_the_command_line(capsys):
    corpus()
    more = ("--data.files", "[a.txt, b.jsonl]", "--data.separator", "\n\n", "--data.length", 16, "--data.held_out", 0.2)
    more += ("--data.batch_size", 4, "--trainer.max_steps", 3, "--trainer.val_check_interval", 3, "--run", "r")
    command(capsys, "--config", "pretrain", "--config", "mup", "--model.model", "tiny:32", *more)
    losses = [r for r in jsonl.read(Path("r/metrics.jsonl")) if "val/loss" in r]
    assert len(losses) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Text(["missing/*.txt"]), "files has 'missing/.*': there is no such file"),
        (lambda: Text([]), "files is .*: it must be one or more files"),
        (lambda: data(held_out=0.5), "held_out is 0.5"),
        (lambda: data(separator=""), "separator is ''"),
        (lambda: attached(length=4096), "length is 4096: it must be at most the model's context of 2048"),
        (lambda: attached(length=400).tasks("train"), "for train, which are .* windows of 400: 4 are needed"),
        (lambda: attached(held_out=0.0).tasks("validation"), "0 tokens in 0 documents for validation"),
        (
            lambda: Path("b.jsonl").write_text('{"text": "a"}\n{"txt": 1}\n') and attached(),
            'line 2 of b.jsonl has no "text"',
        ),
        (lambda: Path("b.jsonl").write_text('{"text": "a"}\n{"te') and attached(), "line 2 of b.jsonl is not JSON"),
        (lambda: Path("a.txt").write_bytes(b"\xff\xfe\x00") and attached(), "a.txt is not text in UTF-8"),
    ],
)
def test_bad_text(make, message):
    corpus()
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("method", [SFT, GRPO])
def test_methods_that_do_not_read_tokens_are_refused(method):
    corpus()
    with pytest.raises(
        ConfigurationError, match=f"Text yields tokens, which Pretrain learns, and not {method.__name__}"
    ):
        trainer().fit(policy(method), data())


def test_a_model_with_shorter_context_leaves_windows_out():
    module = policy(Pretrain)
    module.model.config.max_position_embeddings = 8
    x = module.collect([Task("", meta={"tokens": list(range(3, 3 + n))}) for n in (5, 9, 10)])
    assert x.lengths.tolist() == [5, 9]
    assert module.counts == {"skipped/text_too_long": 1}
