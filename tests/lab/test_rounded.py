"""int4, MXFP4, NVFP4 and int8 arithmetic: codes against brute force and torch, bits by arithmetic."""

import pytest
import torch

from qlora.cli import UserError
from qlora.hardware import detect
from qlora.lab.precisions import load
from qlora.lab.rounded import (
    E2M1,
    SCHEMES,
    RoundedLinear,
    Scheme,
    decode,
    decode_e2m1,
    encode,
    encode_e2m1,
    round_layers,
)
from qlora.measures import relative_error
from qlora.packed import from_bytes, to_bytes
from qlora.weights import dequantized, held_bytes, linear_layers

FP32 = detect("fp32")
BITS = {  # code + scale (and zero) / group
    **{"int4": 4 + 20 / 32, "int4-g64": 4 + 20 / 64, "int4-sym": 4 + 16 / 32, "int4-sym-g64": 4 + 16 / 64},
    **{"mxfp4": 4 + 8 / 32, "nvfp4": 4 + 8 / 16},
}


def weight(rows=48, columns=128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def test_packing_keeps_every_code():
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 2)
    assert to_bytes(codes).nbytes == codes.nbytes // 2 and torch.equal(from_bytes(to_bytes(codes)), codes)


def test_e2m1_takes_the_nearest_number_and_the_even_code_of_two():
    x = torch.cat([torch.linspace(-7, 7, 2801), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    made = decode_e2m1(encode_e2m1(x))
    distance = (x.abs()[:, None] - E2M1).abs()
    assert torch.allclose((x - made).abs(), distance.min(1).values)
    even = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    assert dict(zip(x[-7:].tolist(), made[-7:].tolist())) == even


@pytest.mark.parametrize("name", BITS)
def test_bits_by_arithmetic(name):
    held = encode(weight(), SCHEMES[name])
    size = sum(t.nbytes for key, t in held.items() if key != "whole")  # one number for the matrix
    assert 8 * size / weight().numel() == pytest.approx(BITS[name])


@pytest.mark.parametrize("name", BITS)
def test_what_lies_on_the_grid_is_kept(name):
    once = decode(encode(weight(), SCHEMES[name]), SCHEMES[name])
    assert 0.02 < relative_error(weight(), once) < 0.2
    again = decode(encode(once, SCHEMES[name]), SCHEMES[name])
    assert relative_error(once, again) < (2e-3 if name.startswith("int4") else 1e-6)  # fp16 scales round


@pytest.mark.parametrize("name", BITS)
def test_a_zero_block_and_a_tiny_one(name):
    w = weight()
    w[0] = 0
    w[1] *= 1e-12
    made = decode(encode(w, SCHEMES[name]), SCHEMES[name])
    assert made.isfinite().all() and (made[0] == 0).all() and made[1].abs().max() < 1e-6


def test_smaller_groups_and_a_zero_point_err_less():
    error = {name: relative_error(weight(), decode(encode(weight(), s), s)) for name, s in SCHEMES.items()}
    assert error["int4"] < error["int4-g64"] < error["int4-sym-g64"]
    assert error["int4"] < error["int4-sym"] and error["nvfp4"] < error["mxfp4"]


@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_multiplies_with_what_it_holds(name):
    layer, x = torch.nn.Linear(128, 48), torch.randn(5, 128)
    rounded = RoundedLinear(layer, SCHEMES[name], limit=x.abs().max().item())
    exact = torch.nn.functional.linear(x, dequantized(rounded), layer.bias)
    assert relative_error(exact, rounded(x)) < (0.02 if SCHEMES[name].activations else 1e-6)
    assert sum(t.nbytes for t in rounded.buffers()) * 1.01 > held_bytes([rounded]) - layer.bias.nbytes


def test_a_static_scale_cuts_what_it_has_not_seen():
    layer, x = torch.nn.Linear(64, 8, bias=False), torch.ones(1, 64)
    static = RoundedLinear(layer, SCHEMES["int8-static"], limit=0.5)
    assert relative_error(static(x), layer(x) / 2) < 0.02


def test_whole_model_and_what_is_refused(tiny_folder):
    made = load(str(tiny_folder), "mxfp4", FP32)
    assert all(isinstance(layer, RoundedLinear) for _, layer in linear_layers(made))
    model = load(str(tiny_folder), "fp32", FP32)
    with pytest.raises(UserError, match="groups of 48 do not divide the 64 inputs of model.layers.0"):
        round_layers(model, Scheme("int4", 48))
