"""Precisions side by side: bytes and errors by hand, text measures by the library, rows without figures."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch

from config import COMPARABLE, PRECISIONS
from qlora.cli import UserError
from qlora.hardware import Hardware, detect
from qlora.lab import compare as c
from qlora.lab import compare_pictures as shown
from qlora.lab.precisions import default_precisions, load
from qlora.measures import kl_nats, most_values_in_32
from qlora.weights import dequantized, held_bytes, linear_layers

FP32 = detect("fp32")  # products in fp32: what a layer computes can be compared closely
FEW = {"eval_samples": 4, "seed": 42}


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load(str(tiny_folder), "fp32", FP32)


@pytest.fixture(scope="module")
def text(tokenizer):
    return c.held_out(tokenizer, 4, seed=42).text


@pytest.fixture(scope="module")
def compared(tiny_folder):
    return c.compare(str(tiny_folder), ("nf4-dq", "fp32", "nf4"), **FEW)


# The tiny model has 2 layers of q 64x64, k, v 32x64, o 64x64, gate, up, down 128x64: 2 x 36,864 weights.
WEIGHTS, MATRICES = 73_728, 14


def test_bits_per_weight_of_nf4_by_hand(compared):
    rows = {row["precision"]: row for row in compared["rows"]}
    # half a byte each, an fp32 constant for 64 weights, and the 16 levels in fp32 for each matrix
    plain = WEIGHTS / 2 + WEIGHTS / 64 * 4 + MATRICES * 16 * 4
    # constants in a byte each, an fp32 constant for (at most) 256 of them, their 256 levels and mean in fp32
    double = WEIGHTS / 2 + WEIGHTS / 64 + MATRICES * (4 + 256 * 4 + 4 + 16 * 4)
    assert rows["nf4"]["bits_linear"] == pytest.approx(8 * plain / WEIGHTS)
    assert rows["nf4-dq"]["bits_linear"] == pytest.approx(8 * double / WEIGHTS)
    assert rows["fp32"]["bits_linear"] == 32


@pytest.mark.parametrize(
    "precision, constants",
    [
        ("int8", 4),  # bitsandbytes: an fp32 scale for each output
        ("torchao-int8wo", 4 + 1),  # and a zero point in a byte, although all are zero
    ],
    ids=["bitsandbytes", "torchao"],
)
def test_footprint_counts_every_tensor_that_int8_holds(tiny_folder, text, precision, constants):
    if precision.startswith("torchao"):
        pytest.importorskip("torchao")
    model = load(str(tiny_folder), precision, FP32)
    c.decode(model, text, 1)  # the first pass moves LLM.int8's scales elsewhere
    outputs = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    layers = {id(layer) for _, layer in linear_layers(model)}
    others = [
        t
        for m in model.modules()
        if id(m) not in layers
        for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
    ]
    rest = sum({t.data_ptr(): t.nbytes for t in others}.values())  # the head is tied to the embeddings
    assert held_bytes(model.modules()) == WEIGHTS + constants * outputs + rest


@pytest.mark.parametrize(
    "precision",
    [name for name in COMPARABLE if isinstance(PRECISIONS.get(name, {}), dict) and name != "int8-static"],
)
def test_error_is_measured_on_the_weight_that_the_layer_multiplies_with(tiny_folder, precision):
    if precision.startswith("torchao"):
        pytest.importorskip("torchao")
    model = load(str(tiny_folder), precision, FP32, torch.arange(100, 164).view(2, 32))
    # These round the input to 8 bits as well, static scales for inputs of another size than here.
    rounds_inputs = ("int8", "torchao-int8dyn", "int8-dynamic", "int8-static", "w4a8")
    tolerance = 0.02 if precision in rounds_inputs else 1e-3
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for name, layer in linear_layers(model):
            if layer.in_features == 64:
                wanted = x @ dequantized(layer).float().T
                assert (layer(x) - wanted).norm() < tolerance * wanted.norm(), name


def test_relative_error_by_hand(tiny_folder, model):
    halved = load(str(tiny_folder), "fp32", FP32)
    with torch.no_grad():
        for _, layer in linear_layers(halved):
            layer.weight /= 2  # |W - W/2| / |W| = 1/2
    total, each = c.weight_errors(halved, model)
    assert total == pytest.approx(0.5) and [e["error"] for e in each] == pytest.approx([0.5] * MATRICES)
    assert {"layer": 1, "module": "down_proj"} in [{"layer": e["layer"], "module": e["module"]} for e in each]
    assert c.weight_errors(model, model)[0] == 0


def test_kl_by_hand_and_exactly_zero_against_itself(model, text):
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    # 0.5 ln(0.5 / 0.25) + 0.5 ln(0.5 / 0.75)
    assert kl_nats(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    reference = []
    c.read(model, text, reference)
    assert c.read(model, text, reference)[2] == 0


def test_perplexity_is_exp_of_the_models_own_loss(compared, model, text):
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in text]
    assert compared["reference"] == "fp32" and compared["rows"][0]["perplexity"] == pytest.approx(
        math.exp(np.mean(losses)), rel=1e-5
    )


def test_double_quantization_costs_little_and_every_matrix_has_its_error(compared):
    _, nf4, double = compared["rows"]
    assert nf4["kl"] > 0 and nf4["weight_error"] == pytest.approx(double["weight_error"], rel=0.05)
    assert {name: len(errors) for name, errors in compared["errors"].items()} == {
        "nf4": MATRICES,
        "nf4-dq": MATRICES,
    }
    assert compared["findings"]["order_by_weight_error"] == sorted(
        ("nf4", "nf4-dq"), key=lambda n: {"nf4": nf4, "nf4-dq": double}[n]["weight_error"]
    )


def test_without_torchao_its_row_says_what_to_install(tiny_folder, model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchao", None)
    assert not any(name.startswith("torchao") for name in default_precisions(detect()))
    result = c.compare(str(tiny_folder), ("fp32", "torchao-int8wo"), **FEW)
    assert result["rows"][1] == {
        "precision": "torchao-int8wo",
        "reason": "torchao is not installed: pip install torchao",
    }
    assert "torchao-int8wo: not measured: torchao is not installed" in capsys.readouterr().out
    with pytest.raises(UserError, match="no precision could be measured .torchao is not installed"):
        c.compare(str(tiny_folder), ("torchao-int8wo",), **FEW)


def test_a_row_that_fails_late_does_not_serve_as_reference(tiny_folder, monkeypatch):
    plain = c.score_labels

    def failing(model, *rest):
        if model.dtype == torch.float32:
            raise RuntimeError("CUDA out of memory\nTried to allocate")
        return plain(model, *rest)

    monkeypatch.setattr(c, "score_labels", failing)
    result = c.compare(str(tiny_folder), ("fp32", "bf16"), **FEW)
    assert result["rows"][0]["reason"] == "CUDA out of memory"
    assert result["reference"] == "bf16" and result["rows"][1]["kl"] == 0


def test_gpu_compares_all_and_cpu_leaves_out_what_it_emulates():
    on_gpu = default_precisions(Hardware("cuda", "a GPU", torch.bfloat16, "", 24.0))
    assert on_gpu == tuple(name for name in COMPARABLE if name not in ("gptq", "awq"))  # these write folders
    old = dataclasses.replace(detect(), device="cpu", dtype=torch.float32)
    assert "fp32" in default_precisions(old) and "bf16" not in default_precisions(old)


def test_decoding_too_slow_for_a_second_token_has_no_rate(model, text, monkeypatch):
    assert c.decode(model, text, 4)[0] > 0
    monkeypatch.setattr(c, "DECODE_SECONDS", 0.0)
    assert c.decode(model, text, 4) == (None, False)


@pytest.mark.parametrize("levels", [16, 200])
def test_weights_that_were_in_4_bits_before_are_recognized(levels):
    assert most_values_in_32(torch.arange(64 * 64).reshape(64, 64) % levels) == min(levels, 32)


def fake_rows(*perplexities, decode=1.0):
    names = ("nf4-dq", "fp4", "int4-sym-g64")
    rows = {
        name: {
            "perplexity": x,
            "weight_error": 0.1,
            "footprint_bytes": 40,
            "prefill_tokens_per_second": 50.0,
            "decode_tokens_per_second": decode,
            "decode_is_steady": True,
        }
        for name, x in zip(names, perplexities)
    }
    rows["bf16"] = {
        "perplexity": 1.0,
        "footprint_bytes": 100,
        "prefill_tokens_per_second": 100.0,
        "decode_tokens_per_second": 2.0,
        "decode_is_steady": True,
    }
    return rows


def test_what_the_rows_say_is_computed_from_them(capsys):
    losses = {
        "nf4-dq": np.array([1.0, 2.0, 3.0]),
        "fp4": np.array([2.0, 4.0, 6.0]),
        "int4-sym-g64": np.array([2.0, 4.1, 6.0]),
    }
    found = shown.findings(fake_rows(20, 30, 40), losses, values=31)
    # fp4 - nf4-dq = 1, 2, 3: mean 2, deviation 1, half-width 1.96 / sqrt(3) = 1.1316
    assert found["paired"][0] == pytest.approx(
        {"better": "nf4-dq", "worse": "fp4", "nats": 2, "low": 0.8684, "high": 3.1316}, abs=1e-4
    )
    assert found["agrees_with_paper"] and found["against"]["decode"] == 0.5
    out = capsys.readouterr().out
    assert all(
        words in out
        for words in (
            "could be chance",
            "the same order",
            "not in 4 bits before",
            "memory, not speed",
            "is wrong",
        )
    )
    found = shown.findings(fake_rows(20, 40, 30, decode=6.0), losses, values=16)
    out = capsys.readouterr().out
    assert not found["agrees_with_paper"]
    assert all(
        words in out for words in ("not the order measured here", "flatters", "speed in part", "is right")
    )
    uneven = fake_rows(20, 40, 30, decode=6.0)
    uneven["bf16"]["decode_is_steady"] = False
    shown.findings(uneven, losses, values=16)
    out = capsys.readouterr().out
    assert "run it again" in out and "is right" not in out


def test_pictures_are_drawn_without_the_rows_that_were_not_measured(compared, tmp_path):
    shown.draw_sizes(
        tmp_path / "sizes.png", [*compared["rows"], {"precision": "fp16", "reason": "out of memory"}]
    )
    shown.draw_errors(tmp_path / "errors.png", compared["errors"])
    assert all(
        path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "sizes.png", tmp_path / "errors.png")
    )
