"""muP: the weights that hold the multipliers learn as those that are multiplied, and nothing depends on the width."""

from pathlib import Path

import pytest
import torch
from test_gradients import exact  # noqa: F401
from test_policy import Letters, trainer
from test_resume import policy
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_rl import GRPO, SFT, MuP, Pretrain, Sampling, jsonl
from lit_rl.callbacks import CoordinateCheck
from lit_rl.cli import METHODS
from lit_rl.datamodules import Vowels
from lit_rl.export import export_checkpoint
from lit_rl.mup import groups, initialise, scales, slope

SMALL = MuP(base_width=64)


def llama(width, **kwargs):
    shape = dict(vocab_size=50, hidden_size=width, intermediate_size=2 * width, num_attention_heads=width // 16)
    return LlamaForCausalLM(LlamaConfig(**{**shape, "num_hidden_layers": 3, "num_key_value_heads": 1, **kwargs}))


def multiplied(model, mup):
    """The naive twin, MiniCPM's own form: its multipliers are in the forward, and not in the weights."""
    twin = llama(model.config.hidden_size).to(torch.float64)
    width, branch = mup.base_width / model.config.hidden_size, mup.scale_depth / 3**0.5
    factors = {"model.embed_tokens": mup.scale_emb, "lm_head": width}
    for i in range(3):
        factors |= {f"model.layers.{i}.{name}": branch for name in ("self_attn.o_proj", "mlp.down_proj")}
    twin.load_state_dict(model.state_dict())
    for name, factor in factors.items():
        part = twin.get_submodule(name)
        part.weight.data /= factor
        part.register_forward_hook(lambda module, args, out, factor=factor: out * factor)
    hidden = [p for n, p in twin.named_parameters() if p.dim() == 2 and "embed" not in n and "lm_head" not in n]
    others = [p for p in twin.parameters() if not any(p is h for h in hidden)]
    return twin, lambda lr, decay: torch.optim.AdamW(
        [{"params": hidden, "lr": lr * width}, {"params": others, "lr": lr}], weight_decay=decay
    )


@pytest.mark.parametrize("width", [32, 128])
def test_it_learns_as_the_multiplied_form(width, exact):  # noqa: F811
    """Step by step, with weight decay and Adam's eps, in float64."""
    torch.manual_seed(0)
    model = llama(width)
    initialise(model, SMALL)
    twin, optimizer = multiplied(model, SMALL)
    model.to(torch.float64)
    sides = [(model, torch.optim.AdamW(groups(model, SMALL, 1e-2, 0.1))), (twin, optimizer(1e-2, 0.1))]
    start = model(torch.arange(40)[None]).logits.detach()
    for step in range(6):
        ids = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(step))
        logits = []
        for side, learn in sides:
            out = side(ids).logits
            cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
            learn.step()
            learn.zero_grad()
            logits.append(out.detach())
        assert (logits[0] - logits[1]).norm() < 1e-9 * logits[1].norm(), step
    assert (model(torch.arange(40)[None]).logits - start).norm() > 0.1 * start.norm()


def test_weights_begin_with_minicpms_deviations():
    torch.manual_seed(0)
    model = SFT("tiny:256", mup=MuP(init_std=0.2, base_width=64)).model
    want = {"embed_tokens": 12 * 0.2, "lm_head": 0.2 / 4}
    want |= {"o_proj": 0.2 / 2 * 1.4 / 2, "down_proj": 0.2 / 2 * 1.4 / 2}  # 4 layers
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all()
        else:
            assert weight.std().item() == pytest.approx(want.get(name.split(".")[-2], 0.2 / 2), rel=0.03), name


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_adamw_the_rates(name):
    module = policy(METHODS[name], mup=SMALL, weight_decay=0.1, schedule="linear")
    loop = trainer(max_steps=2)
    loop.fit(module, Letters())
    rates = {}
    for group in loop.optimizers[0].param_groups:
        for weight in group["params"]:
            rates[id(weight)] = group["initial_lr"], group["lr"], group["weight_decay"]
    for one in module.policies:
        assert one.rate == 0
        for weight_name, scale in scales(one.model, SMALL).items():
            lr = 3e-3 * scale.lr * scale.multiplier
            assert rates[id(one.model.get_parameter(weight_name))] == pytest.approx((lr, 0.0, 0.1 / scale.multiplier))
    assert len(rates) == sum(len(list(one.model.parameters())) for one in module.policies)


def check(width, mup):
    """What CoordinateCheck says of a model of this width after four steps, mean over two seeds."""
    rows = []
    for seed in range(2):
        torch.manual_seed(seed)
        module = Pretrain(f"tiny:{width}", lr=5e-3, mup=mup)
        loop = trainer(max_steps=4, callbacks=[CoordinateCheck()])
        loop.fit(module, Vowels(batch_size=4))
        rows.append({k: float(v) for k, v in loop.callback_metrics.items() if k.startswith("coordinates/")})
    return {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}


def test_coordinates_move_alike_at_every_width_under_mup_alone():
    widths = [32, 64, 128, 256]
    for mup, low, high in ((MuP(base_width=64), -0.6, 0.1), (None, 0.4, 2.5)):
        found = [check(width, mup) for width in widths]
        slopes = {name: slope(widths, [values[name] for values in found]) for name in found[0]}
        for name in ("layer-1", "layer-2", "layer-3", "logits"):
            assert low < slopes[f"coordinates/moved/{name}"] < high, (mup, slopes)


def test_slope():
    assert slope([1, 2, 4, 8], [3, 3, 3, 3]) == 0
    assert slope([1, 2, 4, 8], [5, 10, 20, 40]) == pytest.approx(1)
    for widths, values in (([2, 2], [1, 1]), ([1, 2], [0, 1]), ([1, 2], [1, float("nan")])):
        with pytest.raises(ValueError, match="must be"):
            slope(widths, values)


def test_it_exports_as_a_plain_model_and_goes_on_from_there():
    torch.manual_seed(0)
    module = SFT("tiny:64", mup=MuP(), lr=1e-2)
    loop = trainer(max_steps=3)
    loop.fit(module, Letters())
    loop.save_checkpoint("x.ckpt")
    module.export("exported")
    export_checkpoint("x.ckpt", "of checkpoint")
    ids, module = torch.arange(60)[None], module.eval()
    for folder in ("exported", "of checkpoint"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(model(ids).logits, module.model(ids).logits)
    again = GRPO("exported", mup=MuP(), lr=1e-2, sampling=Sampling(max_new_tokens=4))
    assert torch.equal(again.model(ids).logits, module.model(ids).logits), "what is loaded is not begun anew"
    rates = [[g["lr"] for g in one.parameter_groups()] for one in (module, again)]
    assert rates[0] == rates[1] == pytest.approx([1e-2, 12e-2, 4e-2, 0.7 * 4e-2, 4e-2])


def test_coordinates_of_the_command_are_in_its_metrics(capsys):
    from test_cli import fit as command

    more = ("--model.model", "tiny:32", "--trainer.max_steps", 2, "--run", "r")
    command(capsys, "--config", "coordinate_check", "--config", "tiny", *more)
    rows = jsonl.read(Path("r/metrics.jsonl"))
    moved = [row["coordinates/moved/logits"] for row in rows if "coordinates/moved/logits" in row]
    assert len(moved) == 2
    assert 0 < moved[0] < moved[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SFT("tiny-gpt2", mup=MuP()), "mup's model type is gpt2: it must be one of"),
        (lambda: SFT("tiny", mup=MuP(), lora=dict(rank=2)), "lora is set: it must be None with mup"),
        (lambda: SFT("tiny:100"), "'tiny:100' has width 100: it must be a multiple of 32"),
        (lambda: SFT("tiny:"), "'tiny:' has width : it must be a multiple of 32"),
        (lambda: MuP(base_width=0), "mup.base_width is 0: it must be above 0"),
        (lambda: scales(llama(32, tie_word_embeddings=True), SMALL), "tie_word_embeddings is True: it must be False"),
    ],
)
def test_what_cannot_be_scaled(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_another_optimizer_is_refused(capsys):
    from test_cli import run

    short = ("--optimizer", "torch.optim.SGD", "--optimizer.lr", 0.1, "--trainer.max_steps", 1, "--run", "r")
    code, text = run(capsys, "fit", "--config", "sft", "--config", "mup", "--config", "tiny", *short)
    assert code
    assert "--optimizer does not work with model.mup" in text
