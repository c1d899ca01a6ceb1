"""Callbacks work together, and with every method, or say why not before anything runs."""

from itertools import combinations
from pathlib import Path

import lightning.pytorch as L
import pytest
from test_cli import run
from test_gradients import Groups, errors, exact, gradients  # noqa: F401
from test_policy import trainer
from test_resume import policy

from lit_rl import GRPO, hooks
from lit_rl.callbacks import ClipCov, KLCov, SparseAttention
from lit_rl.cli import CALLBACKS, METHODS
from lit_rl.kernels.infllm import Settings

BLOCKS = Settings(kernel_size=4, kernel_stride=2, block_size=4, window_size=4, topk=2, dense_len=-1)
MAKE = CALLBACKS | {
    "ClipCov": lambda: ClipCov(0.1, low=0.0, high=1.5),
    "KLCov": lambda: KLCov(0.2),
    "SparseAttention": lambda: SparseAttention(BLOCKS),
}
PAIRS = list(combinations(CALLBACKS, 2))
INNER = {"epochs": 2, "minibatches": 2}


class Logged(L.Callback):
    """The names of what was logged."""

    names = frozenset()

    def on_train_batch_end(self, trainer, *_):
        self.names |= trainer.callback_metrics.keys()


def refusal(method, *names):
    try:
        hooks.refuse(METHODS[method], [CALLBACKS[name] for name in names], {})
    except ValueError as error:
        return str(error)
    return None


def logged(method, *names, **settings):
    seen = Logged()
    record = gradients(
        METHODS[method], "64-true", callbacks=[*(MAKE[name]() for name in names), seen], **INNER, **settings
    )
    return record, seen.names


@pytest.fixture(scope="module")
def alone():
    """What each callback logs when it is the only one."""
    known = {}

    def names(callback):
        if callback not in known:
            known[callback] = logged("GRPO", callback)[1]
        return known[callback]

    return names


@pytest.mark.parametrize(("a", "b"), PAIRS, ids=map("+".join, PAIRS))
def test_two_callbacks_log_what_each_does_alone_and_do_not_mind_the_split(a, b, alone, exact):  # noqa: F811
    if why := refusal("GRPO", a, b):
        for order in ((a, b), (b, a)):
            with pytest.raises(ValueError, match=why):
                trainer(callbacks=[MAKE[name]() for name in order]).fit(policy(GRPO), Groups())
        return
    for order in ((a, b), (b, a)):
        whole, names = logged("GRPO", *order)
        assert names >= alone(a) | alone(b)
        split, _ = logged("GRPO", *order, microbatch_tokens=60)
        assert max(split.slices) > max(whole.slices)
        assert max(errors(split, whole)) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_callback_or_refuses_it(method, name):
    if why := refusal(method, name):
        with pytest.raises(ValueError, match=why):
            trainer(callbacks=[MAKE[name]()]).fit(policy(METHODS[method]), Groups())
        return
    settings = {"kl_coef": 0.1} if name == "ReferenceRefresh" else {}  # or there is none to refresh
    record, _ = logged(method, name, **settings)
    assert all(gradient.isfinite().all() for gradient in record.seen)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config", "clip_cov", "--trainer.callbacks+=KLCov"), "ClipCov does not work with KLCov: both decide"),
        (
            ("--config", "rlccf", "--trainer.callbacks+=MajorityVote"),
            "MajorityVote does not work with RLCCF: its members",
        ),
        (("--config", "sft", "--trainer.callbacks+=OffPolicyMixing"), "OffPolicyMixing does not work with SFT"),
        (("--config", "ternary", "--model.lora.rank", 4), "TernaryQAT does not work with lora: the weights"),
        (("--config", "chunked", "--config", "lora"), "ReferenceRefresh does not work with lora: with adapters"),
        (("--config", "dapo", "--trainer.callbacks+=ReferenceRefresh"), "ReferenceRefresh needs kl_coef: at 0"),
    ],
)
def test_the_command_line_refuses_before_a_model_is_loaded(words, message, capsys):
    code, text = run(capsys, "fit", *words, "--config", "tiny", "--model.model", "no/such-model")
    assert code
    assert text.startswith(f"lit-rl: {message}")


MINE = """
from lit_rl import GRPO

class Outer:
    class Inner(GRPO):
        pass

def make(model: str = "tiny") -> GRPO:
    return GRPO(model)
"""


@pytest.mark.parametrize(
    "words",
    [("--trainer.callbacks", "EntropyMonitor"), ("--model", "of_a_user.Outer.Inner"), ("--model", "of_a_user.make")],
    ids=["one callback", "a nested class", "a function"],
)
def test_what_a_user_may_name_is_not_in_the_way(words, monkeypatch, capsys):
    Path("of_a_user.py").write_text(MINE)
    monkeypatch.syspath_prepend(".")
    short = ("--trainer.max_steps", 1, "--trainer.enable_progress_bar", "false", "--run", "r")
    code, text = run(capsys, "fit", "--config", "grpo", "--config", "tiny", *words, *short)
    assert code == 0, text
