"""Tests of the exercises of lesson 1."""

from functools import cache

import torch
from safetensors import safe_open

from config import BUNDLED
from qlora import shapes
from qlora.sources import locate


def spelled(code: int, exponent_bits: int, mantissa_bits: int) -> str:
    digits = f"{code:0{1 + exponent_bits + mantissa_bits}b}"
    return f"{digits[0]} {digits[1 : 1 + exponent_bits]} {digits[1 + exponent_bits :]}"


def check_all_codes(read_float, dtype, exponent_bits: int, mantissa_bits: int) -> None:
    """Against torch, every finite code of an 8-bit format."""
    for code, right in enumerate(torch.arange(256, dtype=torch.uint8).view(dtype).double().tolist()):
        if abs(right) < float("inf"):  # false for NaN, too
            bits = spelled(code, exponent_bits, mantissa_bits)
            assert read_float(bits) == right, f"{bits} is {right} in torch"


def test_lesson1_1_ordinary_numbers(lesson):
    assert lesson.read_float("0 01011 1001100110") == 0.0999755859375, "(1 + 614/1024) x 2^(11 - 15)"
    assert lesson.read_float("1 0111 000") == -1.0, "four exponent bits: the offset is 7"
    assert lesson.read_float("0 01111011 1001101") == 0.10009765625, "eight exponent bits: the offset is 127"
    assert lesson.read_float("0 11 1") == 6.0, "FP4's largest: (1 + 1/2) x 2^(3 - 1)"


def test_lesson1_1_small_numbers(lesson):
    assert lesson.read_float("0 00000 01") == 2.0**-16, "no leading 1: 1/4 x 2^(1 - 15)"
    assert lesson.read_float("0 00 1") == 0.5, "FP4's smallest: 1/2 x 2^(1 - 1)"
    assert lesson.read_float("0 0000 000") == 0.0


def test_lesson1_1_every_number_of_fp8(lesson):
    check_all_codes(lesson.read_float, torch.float8_e5m2, 5, 2)
    check_all_codes(lesson.read_float, torch.float8_e4m3fn, 4, 3)  # here 1111 is a usual exponent


def nf4_of_bitsandbytes(block):
    """(codes, scale, weights read back) of a block (64,)."""
    import bitsandbytes.functional as F

    packed, state = F.quantize_4bit(block, quant_type="nf4", blocksize=64)
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), 1).flatten()
    return codes, state.absmax, F.dequantize_4bit(packed, state).flatten(), state.code


def check_block(lesson, block, what: str) -> None:
    codes, scale, back, levels = nf4_of_bitsandbytes(block)
    found, own_scale = lesson.to_codes(block, levels)
    assert float(own_scale) == float(scale), f"{what}: bitsandbytes' scale is {float(scale):.4f}"
    assert found.tolist() == codes.tolist(), f"{what}: bitsandbytes' codes are {codes.tolist()}"
    torch.testing.assert_close(lesson.from_codes(found, own_scale, levels), back, msg=f"{what}: read back")


def test_lesson1_2_by_hand(lesson):
    levels = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    codes, scale = lesson.to_codes(torch.tensor([0.2, -0.4, 0.05, 0.35]), levels)
    assert abs(float(scale) - 0.4) < 1e-6, "the scale is the largest number without its sign"
    assert codes.tolist() == [3, 0, 2, 4], (
        "0.2 / 0.4 = 0.5, code 3; 0.35 / 0.4 = 0.875 is nearer to 1 than to 0.5"
    )
    read = lesson.from_codes(codes, scale, levels)
    torch.testing.assert_close(read, torch.tensor([0.2, -0.4, 0.0, 0.4]))


def test_lesson1_2_the_model_as_bitsandbytes(lesson):
    with safe_open(locate(BUNDLED)[0] / "model.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.0.self_attn.q_proj.weight").float()
    for i, block in enumerate(weight.view(-1, 64)[:60]):
        check_block(lesson, block, f"block {i} of the first matrix")


def test_lesson1_2_a_block_of_zeros(lesson):
    check_block(lesson, torch.zeros(64), "a block of zeros (is something divided by zero?)")


def test_lesson1_3_bits_per_weight(lesson):
    assert lesson.bits_per_weight(4, 64, 32) == 4.5
    assert abs(lesson.bits_per_weight(4, 64, 8, group=256) - 4.126953125) < 1e-9, "4 + 8/64 + 32/(64 x 256)"
    assert lesson.bits_per_weight(4, 32, 8) == 4.25, "MXFP4"
    assert lesson.bits_per_weight(8, 32, 16) == 8.5, "GGUF's Q8_0: 32 codes of 8 bits, a scale in fp16"


def model_of(name: str):
    return shapes.skeleton(shapes.model_config(name)[0])


@cache
def held_in_nf4() -> int:
    """Bytes of the bundled model, loaded in NF4 with double quantization."""
    from qlora import hardware
    from qlora.loading import load_base
    from qlora.weights import held_bytes

    machine = hardware.detect("bf16", "cpu", "fp32")
    return held_bytes(load_base(BUNDLED, "nf4", machine).model.modules())


def test_lesson1_3_three_billion(lesson):
    found = lesson.model_bytes(model_of("llama-3.2-3b"), 4.127) / 1e9
    assert found > 1.7, f"{found:.2f} GB: what is not in Linear modules stays in 16 bits"
    assert abs(found - 2.242) < 0.002, f"{found:.3f} GB; the lesson counts 2.24"


def test_lesson1_3_a_last_matrix_of_its_own(lesson):
    found = lesson.model_bytes(model_of("llama-3.1-8b"), 4.127) / 1e9
    right = (6_979_321_856 * 4.127 / 8 + 1_050_939_392 * 2) / 1e9
    assert abs(found - right) < 1e-6, (
        f"{found:.3f} GB, not {right:.3f}: here the last matrix is not the table"
    )


def test_lesson1_3_what_the_model_here_holds(lesson):
    found, held = lesson.model_bytes(model_of(BUNDLED), 4.127), held_in_nf4()
    assert abs(found / held - 1) < 0.01, f"{found / 1e6:.1f} MB by your count, {held / 1e6:.1f} MB in memory"
