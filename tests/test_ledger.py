"""LoRA's parameters by hand, by our sum and by PEFT; updates of a trained adapter against the full matrices."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from config import MODELS
from qlora.cli import UsageError, UserError
from qlora.hardware import detect
from qlora.weights import dequantized
from qlora.ledger import (
    SHAPES, adapter_ledger, effective_rank, ledger, model_config, short_ledger, show_adapter_ledger, show_ledger,
    show_other_models, skeleton, update_spectrum,
)
from qlora.loading import load_base

PUBLISHED = {  # parameters, as the safetensors files on the hub hold them
    "smollm2-135m": 134_515_008, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-3b": 3_085_938_688, "mistral-7b": 7_248_023_552, "opt-350m": 331_196_416,
}


def of_preset(name: str, target_modules: str, lora_r: int, lora_variant: str = "lora") -> dict:
    return ledger(skeleton(model_config(name)[0]), lora_r, None, target_modules, lora_variant)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_base(str(tiny_folder), "nf4", detect()).model


@pytest.fixture
def adapter(tmp_path, tiny_folder):
    """(folder, PEFT model in fp32): rsLoRA, two ranks, B filled, saved by PEFT."""
    base = load_base(str(tiny_folder), "fp32", detect("fp32")).model
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=True, rank_pattern={"down_proj": 2})
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize("name", MODELS)
def test_a_presets_shapes_give_its_published_parameters(name):
    assert skeleton(model_config(name)[0]).num_parameters() == PUBLISHED[name]


@pytest.mark.parametrize("name, target_modules, r, expected", [
    # 28 layers x 32 x (q 3072+3072, k 3072+1024, v 3072+1024, o 3072+3072) = 28 x 32 x 20,480
    ("llama-3.2-3b", "attention", 32, 18_350_080),
    # 32 layers x 32 x (4096+4096 + 2 x (4096+1024) + 4096+4096) = 32 x 32 x 26,624
    ("llama-3.1-8b", "attention", 32, 27_262_976),
    # 28 layers x 16 x (q 3072+3072, v 3072+1024) = 28 x 16 x 10,240, not 8,388,608
    ("llama-3.2-3b", "q_proj,v_proj", 16, 4_587_520),
    # 28 layers x 256 x (attention 20,480 + three of 3072+8192) = 28 x 256 x 54,272
    ("llama-3.2-3b", "all-linear", 256, 389_021_696),
])
def test_hand_worked_cases_agree_with_our_sum_and_with_peft(name, target_modules, r, expected):
    result = of_preset(name, target_modules, r)
    assert result["parameters"] == result["peft_trainable"] == expected
    assert result["peft_total"] == PUBLISHED[name] + expected
    assert result["bytes"] == 4 * expected


@pytest.mark.parametrize("name, variant", [("opt-350m", "lora"), ("opt-350m", "dora"), ("qwen2.5-0.5b", "rslora"), ("smollm2-135m", "dora")])
def test_the_sum_is_pefts_count_for_other_architectures_and_variants(name, variant):
    result = of_preset(name, "all-linear", 8, variant)
    assert result["parameters"] == result["peft_trainable"]


def test_a_row_has_the_shapes_and_shares_of_its_module_type():
    rows = {row["module"]: row for row in of_preset("llama-3.2-3b", "attention", 32)["rows"]}
    k = rows["k_proj"]
    assert (k["layers"], k["w"], k["a"], k["b"]) == (28, [1024, 3072], [32, 3072], [1024, 32])
    assert k["parameters"] == 28 * 32 * (1024 + 3072) and k["bytes"] == 4 * k["parameters"]
    assert k["share_of_lora"] == pytest.approx(4096 / 20_480)
    assert k["share_of_w"] == pytest.approx(32 * 4096 / (1024 * 3072))
    assert sum(row["share_of_lora"] for row in rows.values()) == pytest.approx(1)


def test_a_loaded_4_bit_model_has_the_ledger_of_its_config_and_stays_as_it_is(tiny):
    before = [(name, type(module)) for name, module in tiny.named_modules()]
    assert ledger(tiny, 4, None, "all-linear") == ledger(skeleton(tiny.config), 4, None, "all-linear")
    assert [(name, type(module)) for name, module in tiny.named_modules()] == before


def test_the_table_shows_count_megabytes_percentage_and_scaling(capsys):
    show_ledger(of_preset("llama-3.2-3b", "attention", 32), "llama-3.2-3b")
    shown = capsys.readouterr().out
    # alpha defaults to 2r: 64/32 = 2; 18,350,080 x 4 bytes = 73.40 MB; of 3,212,749,824 + 18,350,080
    assert "dW = 2 B A (alpha/r)" in shown and "73.40" in shown and "18,350,080 trainable of 3,231,099,904 (0.57%): the same" in shown
    show_ledger(of_preset("llama-3.2-3b", "attention", 16, "rslora"), "x")
    assert "dW = 8 B A (alpha/sqrt(r))" in capsys.readouterr().out  # 32 / sqrt(16)
    assert max(map(len, shown.splitlines())) <= 130


def test_the_count_told_of_the_3b_is_shown_to_be_the_7bs(capsys):
    table = show_other_models()
    # Llama 2 7B, r 16 on q and v: 32 layers x 16 x (4096+4096 + 4096+4096)
    assert table["llama-2-7b"]["q_proj,v_proj r 16"] == 8_388_608 == 32 * 16 * 16_384
    assert list(table["llama-3.2-3b"].values()) == [3_212_749_824, 4_587_520, 18_350_080, 389_021_696]
    assert "counted here: 4,587,520. 8,388,608 is the count of llama-2-7b" in capsys.readouterr().out


def test_a_skeleton_holds_no_weights():
    model = skeleton(model_config("llama-3.1-8b")[0])
    assert {p.device.type for p in model.parameters()} == {"meta"} and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_configs_come_from_presets_hub_ids_of_presets_folders_and_files(tiny_folder):
    assert model_config("llama-3.2-3b")[0].hidden_size == model_config(MODELS["llama-3.2-3b"])[0].hidden_size == 3072
    assert model_config(str(tiny_folder))[0].hidden_size == model_config(str(tiny_folder / "config.json"))[0].hidden_size == 64


def test_an_unknown_model_names_the_presets(tmp_path):
    for name in ("nothing", str(tmp_path), str(tmp_path / "config.json")):
        with pytest.raises(UsageError, match="llama-3.2-1b"):
            model_config(name)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{}", '{"model_type": "no-such-model"}', '{"model_type": "llama", "hidden_size": "wide"}'])
def test_a_file_that_is_no_config_is_told_in_one_line(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not a config"):
        model_config(str(path))


@pytest.mark.parametrize("out, inner, r", [(24, 40, 4), (40, 24, 4), (6, 40, 16)])
def test_singular_values_from_the_core_are_those_of_the_full_update(out, inner, r):
    torch.manual_seed(0)
    a, b = torch.randn(r, inner), torch.randn(out, r)
    full = torch.linalg.svdvals(3 * b @ a)[: min(r, out)]
    torch.testing.assert_close(update_spectrum(a, b, 3.0), full, rtol=1e-4, atol=1e-4)


def test_effective_rank_counts_directions_that_carry_the_update():
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.zeros(4)) == 0
    # p = 3/4, 1/4: entropy 0.75 ln(4/3) + 0.25 ln 4 = 0.5623
    assert effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(math.exp(0.5623), rel=1e-4)


def test_a_trained_adapters_updates_are_those_that_peft_adds(adapter, tiny_folder, capsys):
    folder, peft = adapter
    base = load_base(str(tiny_folder), "fp32", detect("fp32")).model
    result = adapter_ledger(folder, base)
    assert len(result["matrices"]) == 4 and {m["r"] for m in result["matrices"]} == {4, 2}
    for row in result["matrices"]:
        delta = peft.get_base_model().get_submodule(row["name"]).get_delta_weight("default")
        assert row["norm"] == pytest.approx(delta.norm().item(), rel=1e-4)
        assert row["ratio"] == pytest.approx((delta.norm() / base.get_submodule(row["name"]).weight.norm()).item(), rel=1e-4)
        assert row["effective_rank"] == pytest.approx(effective_rank(torch.linalg.svdvals(delta)), rel=1e-3)
    # 6/sqrt(4) = 3 and 6/sqrt(2); q 4 (64+64) and down 2 (128+64), two layers each
    assert result["scalings"] == pytest.approx([3, 6 / math.sqrt(2)]) and result["parameters"] == 2 * (512 + 384) == result["peft_trainable"]
    show_adapter_ledger(result)
    assert "down_proj" in capsys.readouterr().out
    json.dumps(result)


def test_without_weights_the_update_has_a_size_but_no_ratio(adapter, tiny_folder, capsys):
    result = adapter_ledger(adapter[0], skeleton(model_config(str(tiny_folder))[0]))
    assert {m["ratio"] for m in result["matrices"]} == {None} and all(m["norm"] > 0 for m in result["matrices"])
    show_adapter_ledger(result)
    assert "|W| unknown" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["llama-3.2-1b", "opt-350m"])
def test_an_adapter_of_another_model_is_refused(adapter, name):
    with pytest.raises(UserError, match="does not fit this model"):
        adapter_ledger(adapter[0], skeleton(model_config(name)[0]))


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_quantized_weights_are_read_as_the_values_they_stand_for(tiny_folder, precision):
    model = load_base(str(tiny_folder), precision, detect()).model
    plain = load_base(str(tiny_folder), "fp32", detect("fp32")).model
    model(input_ids=torch.tensor([[1, 2, 3]]))  # int8 moves its scales in the first pass
    name = "model.layers.1.mlp.up_proj"
    stored, original = dequantized(model.get_submodule(name)).float(), plain.get_submodule(name).weight
    error = ((stored - original).norm() / original.norm()).item()
    assert error < {"nf4": 0.12, "int8": 0.02}[precision]  # 4 bits err by about 9%, 8 bits by under 1%


def test_the_short_ledger_shares_out_what_a_training_run_adds(tiny_folder):
    model = get_peft_model(skeleton(model_config(str(tiny_folder))[0]), LoraConfig(r=4, target_modules=["q_proj", "k_proj"]), low_cpu_mem_usage=True)
    # two layers: q 4 (64+64) = 512, k 4 (64+32) = 384, so 57.1% and 42.9% of 1,792
    assert short_ledger(model) == ["of 1,792 LoRA parameters: q_proj 57.1%, k_proj 42.9%"]


def test_shapes_are_there_for_every_preset():
    assert SHAPES.keys() == MODELS.keys()
