"""Quantization-aware LoRA: grids, gradients, and that nothing else than what was trained is computed."""

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from peft import LoraConfig, get_peft_model

from config import QatType
from qlora import fast, qat
from qlora.cli import UsageError
from qlora.generation import generate
from qlora.hardware import detect
from qlora.lab import rounded
from qlora.loading import load_base
from qlora.logits import loss_at_labels
from qlora.weights import dequantized

BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]),
    "labels": torch.tensor([[-100, -100, 7, 8], [-100, -100, 11, 12]]),
}


def blocks() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    normal = torch.randn(64, 96)
    tied = torch.randint(-3, 4, (64, 96)) / 4  # the largest magnitude with both signs in nearly every block
    halves = (torch.randint(-127, 128, (64, 96)) + 0.5) / 16  # between two levels
    sizes = 10.0 ** torch.linspace(-44, 6, 64)[:, None]  # down to numbers that fp16, and fp32, lacks
    some_zero = normal * (torch.rand(64, 1) > 0.5)
    return {
        **{"normal": normal, "tied": tied, "halves": halves, "zero": torch.zeros(2, 32)},
        **{"sizes": normal * sizes, "some_zero": some_zero, "negative": -normal.abs()},
        "a_weight": torch.nn.Linear(576, 64).weight.detach(),
    }


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("name", blocks())
def test_ggufs_grids_are_ggufs_own(kind, name):
    weight = blocks()[name]
    with np.errstate(all="ignore"):
        packed = quantize(weight.numpy(), Type[kind])
        theirs = torch.from_numpy(dequantize(packed, Type[kind]))
        ours = qat.GRIDS[kind](weight)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_a_block_by_hand():
    # -8 d = 8, the first of two largest: levels are -d k, d = -1; 7 and -8 are cut to 7 levels below zero
    weight = torch.tensor([[8.0, -8.0, 0.4, 0.6, -7.0] + [0.0] * 27])
    assert qat.q4_0(weight)[0, :5].tolist() == [8, -7, 0, 1, -7]
    assert qat.q4_0(-weight)[0, :5].tolist() == [-8, 7, 0, -1, 7]


def test_int4_is_the_comparisons_row():
    scheme = rounded.SCHEMES["int4-sym"]
    for weight in blocks().values():
        weight = weight.clamp(-1e5, 1e5)
        assert torch.equal(qat.int4(weight), rounded.decode(rounded.encode(weight, scheme), scheme))


def test_fp8_is_e4m3_with_a_scale_a_row():
    weight = torch.randn(8, 40) * torch.logspace(-3, 3, 8)[:, None]
    weight[3] = 0
    ours = qat.fp8(weight)
    assert torch.equal(ours[3], weight[3])
    # 3 bits of mantissa: within 1/16 but for numbers near zero, whose steps are the scale / 512
    scale = weight.abs().amax(1, keepdim=True) / 448
    assert ((ours - weight).abs() <= (weight.abs() / 16).clamp(min=0) + scale / 1024 + 1e-12).all()
    assert torch.allclose(ours.abs().amax(1), weight.abs().amax(1), rtol=1e-6)


@pytest.mark.parametrize("kind", qat.GRIDS)
def test_grids_are_the_flags_and_stay_where_they_are(kind):
    assert set(qat.GRIDS) == set(get_args(QatType))
    weight = torch.randn(16, 64)
    once = qat.GRIDS[kind](weight)
    assert once.dtype == torch.float32 and not torch.equal(once, weight)
    torch.testing.assert_close(qat.GRIDS[kind](once), once, rtol=2e-3, atol=1e-6)  # d is rounded to fp16


def with_grid(folder, kind, precision="nf4", **settings):
    """The tiny model with an adapter through a grid whose B is not zero."""
    model = load_base(str(folder), precision, detect(precision, lane="fp32")).model
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", **settings)
    model = get_peft_model(model, qat.register(config, "Q4_0"))
    qat.use_grid(model, "default", kind)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


class Explicit(torch.autograd.Function):
    """A grid whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx, weight, kind):
        return qat.GRIDS[kind](weight)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@pytest.mark.parametrize("kind", qat.GRIDS)
@pytest.mark.parametrize("precision", ["nf4", "int8", "fp32"])
def test_values_and_gradients_are_those_of_an_explicit_straight_through_estimator(
    tiny_folder, kind, precision
):
    model = with_grid(tiny_folder, kind, precision, use_rslora=True)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(2, 5, layer.in_features, requires_grad=True)
    toward = torch.randn(2, 5, layer.out_features)

    def gradients(y):
        found = torch.autograd.grad((y * toward).sum(), (x, a, b))
        return [y.detach(), *found]

    ours = gradients(layer(x))
    frozen = dequantized(layer.get_base_layer()).detach().float()
    merged = torch.addmm(frozen, b, a, alpha=layer.scaling["default"])  # W + (alpha / sqrt(r)) B A
    assert layer.scaling["default"] == 4
    theirs = gradients(F.linear(x, Explicit.apply(merged, kind)))
    for mine, right in zip(ours, theirs):
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    plain = F.linear(x, merged)
    assert not torch.allclose(ours[0], plain.detach(), rtol=1e-3)


def test_under_autocast_the_grid_is_made_in_fp32(tiny_folder):
    model = with_grid(tiny_folder, "Q4_0", "bf16")
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    merged = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    torch.testing.assert_close(layer._rounded, qat.q4_0(merged).bfloat16(), rtol=0, atol=0)
    assert y.dtype == x.grad.dtype == torch.bfloat16 and a.grad.dtype == b.grad.dtype == torch.float32
    assert a.grad.abs().max() > 0 and b.grad.abs().max() > 0


def test_the_rounded_weight_is_made_again_only_when_an_adapter_changed(tiny_folder, monkeypatch):
    model, calls = with_grid(tiny_folder, "Q8_0"), []
    loss_at_labels(model.get_base_model())
    real = qat.GRIDS["Q8_0"]
    monkeypatch.setitem(qat.GRIDS, "Q8_0", lambda weight: calls.append(1) or real(weight))
    layers, trained = len(qat.grid_layers(model)), [p for p in model.parameters() if p.requires_grad]
    made = lambda: calls.clear() or model(**BATCH).loss.backward() or len(calls)
    assert made() == layers and made() == 0
    for fused in (True, False):  # each kernel of torch's AdamW counts its writes
        torch.optim.AdamW(trained, lr=1e-3, fused=fused).step()
        assert made() == layers and made() == 0
    model.eval()
    with torch.inference_mode():
        model(BATCH["input_ids"])
    assert made() == 0
    layer = qat.grid_layers(model)[0][1]
    layer.scaling["default"] *= 2
    assert made() == 1
    model.load_state_dict({n: p * 0.5 for n, p in model.state_dict().items() if "lora_B" in n}, strict=False)
    with torch.inference_mode():
        calls.clear()
        model(BATCH["input_ids"])
    assert len(calls) == layers
    model.train()
    assert made() == 0  # what was made while generating can be trained with


def test_a_cpus_decoder_and_its_single_product_leave_such_layers_alone(tiny_folder):
    model = with_grid(tiny_folder, "Q4_0").eval()
    ids = BATCH["input_ids"]
    before = model(ids).logits.detach()
    assert fast.make_fast(model, "fp32") == "the libraries' own: quantization-aware training"
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    assert not fast.mergeable(model)
    with torch.no_grad():
        (reply,) = generate(model, [[5, 6, 7]], 1, min_new_tokens=1)
        assert reply[0] == model(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax().item()
    qat.use_grid(model, "default", None)
    assert fast.mergeable(model)


def test_without_grid_it_is_pefts_lora(tiny_folder):
    model, ids = with_grid(tiny_folder, "Q4_0", "fp32").eval(), BATCH["input_ids"]
    plain = load_base(str(tiny_folder), "fp32", detect("fp32", lane="fp32")).model.eval()
    base = plain(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, base)
    rounded_logits = model(ids).logits
    with qat.without_grid(model):
        lora = model(ids).logits
    assert torch.equal(model(ids).logits, rounded_logits) and not torch.equal(lora, rounded_logits)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert isinstance(layer, qat.GridLinear)
    peft = get_peft_model(
        plain, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    )
    peft.load_state_dict(model.state_dict())
    assert torch.equal(peft.eval()(ids).logits, lora)


def test_recomputed_activations_change_no_gradient(tiny_folder):
    def gradients(recompute):
        model = with_grid(tiny_folder, "Q4_0").train()
        loss_at_labels(model.get_base_model())
        if recompute:
            how = {"use_reentrant": False}
            model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model(**BATCH).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    kept, again = gradients(False), gradients(True)
    assert kept and all(torch.equal(kept[name], again[name]) for name in kept)


def test_rows_that_are_not_whole_blocks(tiny_folder):
    model = with_grid(tiny_folder, None, "fp32")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.in_features = 40
    for kind in ("Q4_0", "Q8_0", "int4"):
        with pytest.raises(
            UsageError, match=f"--qat {kind}: .*q_proj is 40 wide, not a multiple of 32; use fp8"
        ):
            qat.use_grid(model, "default", kind)
    qat.use_grid(model, "default", "fp8")


def test_a_batch_of_several_adapters_is_refused(tiny_folder):
    model = with_grid(tiny_folder, "Q4_0").eval()
    with pytest.raises(ValueError, match="can't share a batch"):
        model(input_ids=BATCH["input_ids"], adapter_names=["default", "__base__"])
