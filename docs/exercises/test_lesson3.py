"""Tests of lesson 3's exercises: your LoRA against PEFT's, your count against PEFT's count."""

from __future__ import annotations

import copy
import functools

import torch
from peft import LoraConfig, get_peft_model

from config import DemoSettings
from qlora.hardware import detect
from qlora.lab.ledger import ledger
from qlora.loading import load_base
from qlora.shapes import model_config

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def linear(inner: int, out: int, seed: int = 0) -> torch.nn.Linear:
    torch.manual_seed(seed)
    return torch.nn.Linear(inner, out)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@functools.cache
def first_layers() -> torch.nn.Module:
    """The bundled model's real weights, but only its first two layers, so that the tests are quick."""
    model = load_base("smollm2-135m", "fp32", detect("fp32", "cpu", "fp32")).model
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


def with_peft(model: torch.nn.Module, names: list[str], r: int, alpha: float) -> torch.nn.Module:
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)
    return get_peft_model(copy.deepcopy(model), config)


def fill_b(layer_pairs, seed: int = 1) -> None:
    """The same A and B in yours and PEFT's, as if both were trained."""
    generator = torch.Generator().manual_seed(seed)
    for mine, theirs in layer_pairs:
        mine.B.data = 0.02 * torch.randn(mine.B.shape, generator=generator)
        theirs.lora_A["default"].weight.data = mine.A.data.clone()
        theirs.lora_B["default"].weight.data = mine.B.data.clone()


def test_lesson3_1_shapes_and_start(lesson):
    layer = lesson.LoRALinear(linear(24, 10), r=4, alpha=8)
    assert tuple(layer.A.shape) == (4, 24), "A leads down to r numbers: its shape is (r, in)"
    assert tuple(layer.B.shape) == (10, 4), "B leads up to the outputs: its shape is (out, r)"
    x = torch.randn(3, 5, 24)
    assert torch.equal(layer(x), linear(24, 10)(x)), "before training it must be the base exactly: B A = 0"
    assert layer.A.abs().min() > 0, "A must not be zero, or no gradient ever reaches B"
    assert not layer.B.any(), "it is B that begins at zero, as in the paper and in PEFT"
    limit = 24**-0.5
    assert layer.A.abs().max() <= limit, "kaiming_uniform_(A, a=5**0.5) lies within 1/sqrt(in)"


def test_lesson3_1_only_a_and_b_learn(lesson):
    layer = lesson.LoRALinear(linear(24, 10), r=4, alpha=8)
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"}, f"only A and B are trained, but here: {sorted(trained)}"
    layer(torch.randn(6, 24)).pow(2).sum().backward()
    assert layer.B.grad.any(), "at step 0 the gradient of B is s g (A x)^T, not zero"
    assert not layer.A.grad.any(), "at step 0 the gradient of A is s B^T g x^T, zero because B is"


def test_lesson3_1_equals_peft(lesson):
    for r, alpha in ((4, 8), (8, 8), (2, 16), (16, 8)):
        base = torch.nn.Sequential()
        base.add_module("q_proj", linear(24, 10))
        peft = with_peft(base, ["q_proj"], r, alpha)
        theirs, mine = peft.base_model.model.q_proj, lesson.LoRALinear(linear(24, 10), r, alpha)
        fill_b([(mine, theirs)])
        x = torch.randn(3, 5, 24)
        mine_x, peft_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = mine(mine_x), peft(peft_x)
        assert near(a, b), f"r {r}, alpha {alpha}: other outputs than PEFT's; the scale is alpha / r"
        a.pow(2).sum().backward()
        b.pow(2).sum().backward()
        assert near(mine.A.grad, theirs.lora_A["default"].weight.grad), "another gradient of A than PEFT's"
        assert near(mine.B.grad, theirs.lora_B["default"].weight.grad), "another gradient of B than PEFT's"
        assert near(mine_x.grad, peft_x.grad), "another gradient of x: the layers below would learn wrongly"


def test_lesson3_2_a_real_model_equals_peft(lesson):
    names, mine = ["q_proj", "v_proj", "down_proj"], copy.deepcopy(first_layers())
    ids = torch.arange(100, 116)[None]
    before = first_layers()(input_ids=ids).logits
    count, peft = lesson.add_lora(mine, names, 4, 16), with_peft(first_layers(), names, 4, 16)
    assert torch.equal(mine(input_ids=ids).logits, before), "untrained LoRA must change nothing"
    pairs = [(m, peft.base_model.model.get_submodule(n)) for n, m in mine.named_modules() if hasattr(m, "A")]
    assert len(pairs) == 6, f"3 targets in each of 2 layers are 6 matrices, not {len(pairs)}"
    fill_b(pairs)
    losses = [m(input_ids=ids, labels=ids).loss for m in (mine, peft)]
    assert near(*losses), "the loss differs from PEFT's"
    for loss in losses:
        loss.backward()
    for a, b in pairs:
        assert near(a.A.grad, b.lora_A["default"].weight.grad), "another gradient of an A than PEFT's"
        assert near(a.B.grad, b.lora_B["default"].weight.grad), "another gradient of a B than PEFT's"
    assert count == peft.get_nb_trainable_parameters()[0], "PEFT trains another number of parameters"
    trained = sum(p.numel() for p in mine.parameters() if p.requires_grad)
    assert trained == count, "embeddings and norms must be frozen, too"


def test_lesson3_2_a_name_that_fits_nothing(lesson):
    model, complaint = copy.deepcopy(first_layers()), ""
    try:
        lesson.add_lora(model, ["q_proj", "w_o"], 4, 16)
    except ValueError as error:
        complaint = str(error)
    assert "w_o" in complaint, "w_o fits no layer (Llama's is o_proj): ValueError has to name it"
    plain = all(type(m) is not lesson.LoRALinear for m in model.modules())
    assert plain, "after the error the model must be as it was: look at all names first"


def test_lesson3_3_by_hand(lesson):
    config = model_config("llama-3.2-3b")[0]
    # 28 layers x 16 x (3072 + 3072 for q, and 3072 + 1024 for v)
    counted = lesson.lora_parameters(config, ["q_proj", "v_proj"], 16)
    assert counted == 4_587_520, f"not {counted:,}: v_proj has 8 x 128 outputs, not 3072"
    assert lesson.lora_parameters(config, ATTENTION, 32) == 18_350_080
    assert lesson.lora_parameters(config, ALL, 256) == 389_021_696


def test_lesson3_3_by_peft(lesson):
    cases = (
        ("llama-3.1-8b", "attention", 8),
        ("smollm2-135m", "all-linear", 16),
        ("qwen3-0.6b", "q_proj", 4),
    )
    for name, targets, r in cases:
        config, names = (
            model_config(name)[0],
            {"all-linear": ALL, "attention": ATTENTION}.get(targets, [targets]),
        )
        counts = ledger(config, DemoSettings(target_modules=targets, lora_r=r))
        counted = lesson.lora_parameters(config, names, r)
        assert counted == counts["peft_trainable"], (
            f"{name}, {targets}: PEFT has {counts['peft_trainable']:,}"
        )


def test_lesson3_3_largest_rank(lesson):
    config = model_config("llama-3.2-3b")[0]
    found = [lesson.largest_rank(config, ALL, megabytes) for megabytes in (6, 70, 100)]
    assert found[0] == 0, "one rank on all seven targets takes 28 x 54,272 x 4 bytes = 6.08 MB"
    assert found == [0, 11, 16], f"70 / 6.08 = 11.5 and 100 / 6.08 = 16.5, but you found {found}"
    assert lesson.largest_rank(config, ATTENTION, 73.5) == 32, "r 32 on the four is 73.4 MB"
