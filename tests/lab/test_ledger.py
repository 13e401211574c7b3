"""LoRA's parameters by hand, by our sum and by PEFT; a trained adapter's updates and the full matrices."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from config import DemoSettings
from qlora.cli import UserError
from qlora.hardware import detect
from qlora.lab.ledger import (
    adapter_ledger,
    effective_rank,
    ledger,
    show_adapter_ledger,
    show_ledger,
    show_other_models,
    update_spectrum,
    variant_of,
)
from qlora.loading import load_base
from qlora.shapes import model_config, skeleton


def of_preset(name: str, target_modules: str, lora_r: int, lora_variant: str = "lora") -> dict:
    config = AutoConfig.for_model("opt") if name == "opt" else model_config(name)[0]
    return ledger(
        config, DemoSettings(target_modules=target_modules, lora_r=lora_r, lora_variant=lora_variant)
    )


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_base(str(tiny_folder), "nf4", detect()).model


@pytest.fixture
def adapter(tmp_path, tiny_folder):
    """(folder, PEFT model in fp32): rsLoRA, two ranks, B filled, saved by PEFT."""
    base = load_base(str(tiny_folder), "fp32", detect("fp32")).model
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"down_proj": 2},
    )
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    return tmp_path, model


@pytest.mark.parametrize(
    "name, target_modules, r, expected",
    [
        # 28 layers x 32 x (q 3072+3072, k 3072+1024, v 3072+1024, o 3072+3072) = 28 x 32 x 20,480
        ("llama-3.2-3b", "attention", 32, 18_350_080),
        # 32 layers x 32 x (4096+4096 + 2 x (4096+1024) + 4096+4096) = 32 x 32 x 26,624
        ("llama-3.1-8b", "attention", 32, 27_262_976),
        # 28 layers x 16 x (q 3072+3072, v 3072+1024) = 28 x 16 x 10,240, not 8,388,608
        ("llama-3.2-3b", "q_proj,v_proj", 16, 4_587_520),
        # 28 layers x 256 x (attention 20,480 + three of 3072+8192) = 28 x 256 x 54,272
        ("llama-3.2-3b", "all-linear", 256, 389_021_696),
    ],
)
def test_hand_worked_cases_agree_with_our_sum_and_with_peft(name, target_modules, r, expected):
    result = of_preset(name, target_modules, r)
    assert result["parameters"] == result["peft_trainable"] == expected
    assert result["peft_total"] == skeleton(model_config(name)[0]).num_parameters() + expected
    assert result["bytes"] == 4 * expected


@pytest.mark.parametrize(
    "name, variant", [("opt", "lora"), ("opt", "dora"), ("qwen2.5-0.5b", "rslora"), ("smollm2-135m", "dora")]
)
def test_the_sum_is_pefts_count_for_other_architectures_and_variants(name, variant):
    result = of_preset(name, "all-linear", 8, variant)
    assert result["parameters"] == result["peft_trainable"] and result["variant"] == variant


def test_the_variant_of_a_plain_config_is_lora():
    assert [variant_of(LoraConfig(**o)) for o in ({}, {"use_rslora": True}, {"use_dora": True})] == [
        "lora",
        "rslora",
        "dora",
    ]


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
    four = DemoSettings(lora_r=4)
    assert ledger(tiny.config, four) == ledger(skeleton(tiny.config).config, four)
    assert [(name, type(module)) for name, module in tiny.named_modules()] == before


def test_the_table_shows_count_megabytes_percentage_and_scaling(capsys):
    show_ledger(of_preset("llama-3.2-3b", "attention", 32), "llama-3.2-3b")
    shown = capsys.readouterr().out
    # alpha defaults to 2r: 64/32 = 2; 18,350,080 x 4 bytes = 73.40 MB; of 3,212,749,824 + 18,350,080
    assert (
        "dW = 2 B A (alpha/r)" in shown
        and "73.40" in shown
        and "18,350,080 trainable of 3,231,099,904 (0.57%): the same" in shown
    )
    show_ledger(of_preset("llama-3.2-3b", "attention", 16, "rslora"), "x")
    assert "dW = 8 B A (alpha/sqrt(r))" in capsys.readouterr().out  # 32 / sqrt(16)
    assert max(map(len, shown.splitlines())) <= 130


def test_the_count_told_of_the_3b_is_shown_to_be_the_7bs(capsys):
    table = show_other_models()
    # Llama 2 7B, r 16 on q and v: 32 layers x 16 x (4096+4096 + 4096+4096)
    assert table["llama-2-7b"]["q_proj,v_proj r 16"] == 8_388_608 == 32 * 16 * 16_384
    assert list(table["llama-3.2-3b"].values()) == [3_212_749_824, 4_587_520, 18_350_080, 389_021_696]
    assert "counted here: 4,587,520.\n  8,388,608 is the count of llama-2-7b." in capsys.readouterr().out


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
        assert row["ratio"] == pytest.approx(
            (delta.norm() / base.get_submodule(row["name"]).weight.norm()).item(), rel=1e-4
        )
        assert row["effective_rank"] == pytest.approx(effective_rank(torch.linalg.svdvals(delta)), rel=1e-3)
    # 6/sqrt(4) = 3 and 6/sqrt(2); q 4 (64+64) and down 2 (128+64), two layers each
    assert (
        result["scalings"] == pytest.approx([3, 6 / math.sqrt(2)])
        and result["parameters"] == 2 * (512 + 384) == result["peft_trainable"]
    )
    show_adapter_ledger(result)
    assert "down_proj" in capsys.readouterr().out
    json.dumps(result)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "opt"])
def test_an_adapter_of_another_model_is_refused(adapter, name):
    with pytest.raises(UserError, match="does not fit this model"):
        adapter_ledger(
            adapter[0], skeleton(AutoConfig.for_model("opt") if name == "opt" else model_config(name)[0])
        )
