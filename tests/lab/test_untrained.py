"""A fresh adapter changes nothing, PEFT scales by alpha/r, and noise has the size that was asked for."""

import dataclasses
import json
import math

import pytest
import torch

from config import DemoSettings
from qlora.cli import UserError
from qlora.hardware import detect
from qlora.lab.untrained import check_formula, drift, fill_b, fresh_matrices, show_untrained, untrained_lora
from qlora.loading import load_base
from qlora.lora import lora_config
from qlora.weights import dequantized

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def base(tiny_folder):
    return load_base(str(tiny_folder), "nf4", detect())


@pytest.fixture
def nf4(base):
    return base.model


def adapter(model, r: int, modules: str = "all-linear", variant: str = "lora", alpha: int | None = None):
    settings = DemoSettings(lora_r=r, lora_alpha=alpha, target_modules=modules, lora_variant=variant)
    return lora_config(model, settings)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_a_fresh_adapter_gives_the_bases_logits_bit_for_bit_and_noise_in_b_does_not(nf4):
    before = logits(nf4)
    with untrained_lora(nf4, adapter(nf4, 4), seed=1) as layers, torch.no_grad():
        assert len(layers) == 14 and torch.equal(logits(nf4), before)
        fill_b(layers, 0.1, seed=1)
        assert not torch.equal(logits(nf4), before)


def test_a_is_uniform_up_to_one_over_the_root_of_its_inputs_and_b_is_zero(nf4):
    with untrained_lora(nf4, adapter(nf4, 16), seed=1) as layers:
        rows = {row["in"]: row for row in fresh_matrices(layers)}
    assert rows.keys() == {64, 128} and rows[64]["matrices"] == 12
    # bound 1/sqrt(64) = 0.125, std 0.125/sqrt(3) = 0.0722; 12 x 16 x 64 draws
    assert rows[64]["largest_a"] == pytest.approx(0.125, rel=0.01) and rows[64]["std_a"] == pytest.approx(
        0.0722, rel=0.03
    )
    assert rows[64]["bound_by_formula"] == 0.125 and rows[64]["std_by_formula"] == pytest.approx(
        0.0722, rel=1e-3
    )
    assert rows[64]["largest_b"] == rows[64]["largest_ba"] == 0


def test_the_seed_decides_a_and_the_callers_random_state_stays(nf4):
    torch.manual_seed(3)
    state, drawn = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        with untrained_lora(nf4, adapter(nf4, 4, "q_proj"), seed) as layers:
            drawn.append(layers["model.layers.0.self_attn.q_proj"].lora_A["default"].weight.clone())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_base_is_what_it_was_also_after_an_error(nf4):
    def state():
        return (
            [(n, type(m)) for n, m in nf4.named_modules()],
            [p.requires_grad for p in nf4.parameters()],
            hasattr(nf4, "peft_config"),
        )

    before, reference = state(), logits(nf4)
    with pytest.raises(ZeroDivisionError), untrained_lora(nf4, adapter(nf4, 4), 1) as layers, torch.no_grad():
        fill_b(layers, 0.3, seed=1)
        raise ZeroDivisionError
    assert state() == before and torch.equal(logits(nf4), reference)


@pytest.mark.parametrize("variant, scaling", [("lora", 12 / 4), ("rslora", 12 / math.sqrt(4))])
def test_noise_makes_every_update_the_asked_share_of_its_weight(nf4, variant, scaling):
    with untrained_lora(nf4, adapter(nf4, 4, "all-linear", variant, 12), 1) as layers, torch.no_grad():
        filled = fill_b(layers, 0.03, seed=1)
        for layer in layers.values():
            delta = scaling * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            assert (
                delta.norm() / dequantized(layer.get_base_layer()).float().norm()
            ).item() == pytest.approx(0.03, rel=1e-3)
    assert filled["ratio"] == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize("variant, right", [("lora", "alpha/r"), ("rslora", "alpha/sqrt(r)")])
def test_peft_scales_by_alpha_over_r_or_its_root_and_never_by_alpha(tiny_folder, variant, right):
    model = load_base(str(tiny_folder), "fp32", detect("fp32")).model
    with untrained_lora(model, adapter(model, 4, "v_proj", variant, 12), 1) as layers, torch.no_grad():
        fill_b(layers, 0.1, seed=1)
        check = check_formula(*next(iter(layers.items())), torch.float32, seed=1)
    errors = {row["rule"]: row["relative"] for row in check["rules"]}
    assert errors.pop(right) < 1e-6 and min(errors.values()) > 0.02
    assert (check["w"], check["a"], check["b"]) == ([32, 64], [4, 64], [32, 4])


def test_drift_is_the_mean_kl_and_the_share_of_equal_likeliest_tokens():
    base = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    other = torch.tensor([[0.75, 0.25], [0.1, 0.9]]).log()
    # 0.5 ln(0.5/0.75) + 0.5 ln(0.5/0.25) = 0.1438; and 0.9 ln 9 + 0.1 ln(1/9) = 0.8 ln 9 = 1.7578
    found = drift(base, other)
    assert (
        found["kl_nats"] == pytest.approx((0.1438 + 1.7578) / 2, abs=1e-4) and found["top1_agreement"] == 0.5
    )
    assert drift(base, base) == {"kl_nats": 0.0, "top1_agreement": 1.0}


def test_the_demonstration_tells_no_change_at_zero_and_more_drift_with_more_noise(base, capsys):
    result = show_untrained(base, adapter(base.model, 4), "A good film is", seed=1, tokens=3)
    shown = capsys.readouterr().out
    assert result["equal"] and "the base's, bit for bit" in shown
    kl = [row["kl_nats"] for row in result["noise"]]
    assert kl[0] == 0 and kl[-1] > 100 * kl[1] > 0 and kl[-1] > kl[-2] > kl[-3]
    assert f"{result['noise'][-1]['kl_nats']:.4f}" in shown and max(map(len, shown.splitlines())) <= 130
    json.dumps(result)


def test_dora_on_int8_is_refused_before_it_ruins_the_base(tiny_folder):
    # PEFT 0.21.2 reassigns the weight when it reads it on a CPU; the next forward pass then lacks its scales.
    model = load_base(str(tiny_folder), "int8", dataclasses.replace(detect(), device="cpu")).model
    before = logits(model)
    with (
        pytest.raises(UserError, match="dora.*int8"),
        untrained_lora(model, adapter(model, 4, "q_proj", "dora"), 1),
    ):
        pass
    assert torch.equal(logits(model), before)
