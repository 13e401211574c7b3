"""The outline's bytes against transformers' own count, and against one layer worked out by hand."""

import json

import pytest
import torch
from transformers import AutoConfig

from qlora.hardware import detect
from qlora.lab.outline import describe, show_outline
from qlora.loading import load_base
from qlora.packed import PackedLinear, Packing
from qlora.shapes import model_config, skeleton

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 100, "n_positions": 16}


def find(node: dict, name: str) -> dict | None:
    """First node of that name, depth first."""
    return (
        node
        if node["name"] == name
        else next((hit for child in node["children"] if (hit := find(child, name))), None)
    )


@pytest.fixture(scope="module")
def nf4(tiny_folder):
    return load_base(str(tiny_folder), "nf4", detect()).model


def test_bytes_are_the_libraries_own_and_the_block_constants_come_on_top(nf4, capsys):
    result = show_outline(nf4)
    assert result["bytes"] == result["memory_footprint"] == nf4.get_memory_footprint()
    # q_proj, 64 x 64: 64 blocks of 64 with a byte each, one block of 256 of those: 4 bytes, levels 16 x 4,
    # those of the constants 256 x 4, their mean 4
    q = find(result["tree"], "q_proj")
    assert q["own_bytes"] == 64 * 64 // 2 and q["own_constants"] == 64 + 4 + 64 + 1024 + 4
    assert q["shape"] == "64 x 64" and q["stored"] == "nf4 in uint8"
    quantized = next(row for row in result["sums"] if row["constants"])
    # two layers of q 64x64, k and v 32x64, o 64x64, gate, up and down 128x64
    assert quantized["modules"] == 14 and quantized["values"] == 2 * (2 * 4096 + 2 * 2048 + 3 * 8192)
    shown = capsys.readouterr().out
    assert "Linear4bit, quantized" in shown and "LlamaRMSNorm, not quantized" in shown
    assert f"with the constants, which it leaves out: {result['bytes'] + result['constants']:,}" in shown
    json.dumps(result)


def test_equal_layers_are_folded_and_a_different_one_is_not(capsys):
    model = skeleton(AutoConfig.for_model(**GPT2))
    show_outline(model)
    assert "0-2: 3 x GPT2Block" in capsys.readouterr().out
    model.transformer.h[1].mlp.to(torch.float32)
    result = show_outline(model)
    assert [(n["name"], n["count"]) for n in find(result["tree"], "h")["children"]] == [
        ("0", 1),
        ("1", 1),
        ("2", 1),
    ]
    assert result["bytes"] == model.get_memory_footprint()


def test_a_tied_head_has_no_bytes_of_its_own(capsys):
    result = show_outline(skeleton(AutoConfig.for_model(**GPT2)))
    assert find(result["tree"], "lm_head")["bytes"] == 0
    assert "tied to transformer.wte.weight" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "qwen2.5-0.5b", "opt"])
def test_skeletons_of_any_architecture_are_outlined_to_the_byte(name, capsys):
    model = skeleton(AutoConfig.for_model("opt") if name == "opt" else model_config(name)[0])
    result = show_outline(model)
    assert result["bytes"] == model.get_memory_footprint() and result["constants"] == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 130


def test_int8_scales_are_counted_before_and_after_their_first_use(tiny_folder):
    model = load_base(str(tiny_folder), "int8", detect()).model
    before = show_outline(model)
    model(input_ids=torch.tensor([[1, 2, 3]]))
    after = show_outline(model)
    # one fp32 scale per row; rows per layer: q 64, k 32, v 32, o 64, gate 128, up 128, down 64
    assert before["constants"] == after["constants"] == 2 * 4 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    assert before["bytes"] == after["bytes"] == model.get_memory_footprint()


def test_a_packed_layer_is_shown_as_its_matrix():
    packing = Packing("gptq", 4, 32, 1)
    node = describe(PackedLinear(16, 64, None, packing, torch.float32))
    assert node["shape"] == "16 x 64" and node["stored"] == "4-bit codes in uint8" and node["values"] == 1024
    assert node["bytes"] == 1024 // 2 and node["constants"] == 16 * 2 * (1 + 2)  # a zero and a scale
