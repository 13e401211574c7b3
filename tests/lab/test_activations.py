"""int8 activations: dynamic and static scales, outliers; against numbers by hand and bitsandbytes."""

import json

import pytest
import torch

from qlora.hardware import detect
from qlora.lab.activations import (
    TEXTS,
    compare,
    describe,
    keep_outliers,
    largest_inputs,
    output_error,
    quantize_static,
    show_activations,
)
from qlora.loading import load_base
from qlora.weights import dequantized


@pytest.fixture(scope="module")
def bases(tiny_folder) -> dict:
    return {
        precision: load_base(str(tiny_folder), precision, detect(precision))
        for precision in ("nf4", "int8", "fp32")
    }


def test_a_static_scale_cuts_what_is_beyond_its_limit():
    # limit 254: steps of 2. 3 is 1.5 steps, a tie, and goes to the even 2 steps; 300 is cut to 127 steps.
    assert quantize_static(torch.tensor([3.0, -2.4, 300.0, -1000.0]), 254.0).tolist() == [
        4.0,
        -2.0,
        254.0,
        -254.0,
    ]


def test_output_error_by_hand():
    exact = torch.tensor([[30.0, 40.0], [3.0, 4.0], [0.0, 1.0]])
    y = torch.tensor([[30.0, 45.0], [3.0, 5.0], [0.0, 0.5]])
    # errors 5/50 = 0.1 (the first token), 1/5 = 0.2, 0.5/1 = 0.5; torch's median of two is the lower one;
    # as one vector: sqrt(25 + 1 + 0.25) / sqrt(2500 + 25 + 1)
    error = output_error(y, exact, torch.tensor([True, False, False]))
    assert error == {
        "later": pytest.approx(0.2),
        "first": pytest.approx(0.1),
        "all": pytest.approx((26.25 / 2526) ** 0.5),
    }


def planted(outlier_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (40, 256) of at most 4, and a weight (32, 256); in some columns one token has exactly 6,
    and but for the first of them every other token 60, the rest 5.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 256, generator=generator).clamp(-4, 4)
    x[::2, 1:outlier_columns] = 60
    x[1::2, 1:outlier_columns] = 5
    x[1, :outlier_columns] = 6
    return x, torch.randn(32, 256, generator=generator) / 16


def test_one_huge_token_spoils_a_static_scale_and_a_cut_one_spoils_that_token(capsys):
    x, weight = planted(0)
    first = torch.arange(40) % 20 == 0
    x[first, 0] = 3000
    errors = list(compare(x, weight, torch.arange(40) < 20, first, "layer").values())
    dynamic, static, cut = errors[1], errors[2], errors[4]
    # steps of 3000/127 = 23.6 round all values of 4 and less to zero
    assert static["later"] == pytest.approx(1) and static["first"] < 0.01
    assert dynamic["later"] < 0.02 and dynamic["first"] < 0.01
    assert cut["later"] < 0.02 and cut["first"] > 0.9
    assert "static scales come from 20 tokens" in capsys.readouterr().out


def test_how_uneven_an_input_is_by_hand():
    # First token: largest 8, root mean square sqrt((36 + 64) / 4) = 5, so 1.6. Later ones: 1 and 4 / 2 = 2.
    # Columns 0 (exactly 6) and 3 hold values of 6 or more.
    x = torch.tensor([[6.0, 0, 0, -8], [1, 1, 1, -1], [0, 4, 0, 0]])
    row = describe(x, torch.tensor([True, False, False]))
    assert row == {
        "largest_first": 8,
        "largest_later": 4,
        "columns": 4,
        "outlier_columns": 2,
        "crest": pytest.approx(1.6),
    }


@pytest.mark.parametrize("columns", [0, 3])
def test_outlier_columns_are_found_and_handled_as_bitsandbytes_does(columns):
    x, weight = planted(columns)
    found = keep_outliers(x, weight, torch.arange(40) == 0)
    assert found["columns"] == columns and found["codes_equal_library"] and found["output_difference"] < 1e-4
    if columns:
        assert found["mixed"]["later"] < found["int8"]["later"] / 2
    else:
        assert found["mixed"] == found["int8"]


@pytest.mark.parametrize("precision", ["nf4", "int8", "fp32"])
def test_a_layer_s_weight_is_what_it_multiplies_by(bases, precision):
    layer = bases[precision].model.model.layers[0].mlp.down_proj
    one_hot = torch.eye(layer.in_features, dtype=bases[precision].model.dtype)
    with torch.no_grad():
        product = layer(one_hot).T.float()
    # bitsandbytes' int8 multiplies by 6.200124e-05 for 1/127^2 = 6.200012e-05, and gives 16 bits back
    assert torch.allclose(dequantized(layer).float(), product, rtol=2**-7, atol=0)


def test_inputs_are_those_of_each_text_alone(bases):
    model, tokenizer = bases["fp32"].model, bases["fp32"].tokenizer
    inputs, first, calibration = largest_inputs(model, tokenizer, TEXTS, keep=100)
    lengths = [len(tokenizer(text).input_ids) for text in TEXTS]
    assert len(inputs) == 14 and len(first) == sum(lengths)
    assert first.nonzero().flatten().tolist() == [sum(lengths[:i]) for i in range(len(TEXTS))]
    assert calibration.sum() == sum(lengths[: len(TEXTS) // 2])
    seen = []
    layer = model.model.layers[1].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0][0]))
    with torch.no_grad():
        for text in TEXTS:
            model(**tokenizer(text, return_tensors="pt"))
    hook.remove()
    assert torch.allclose(torch.cat(seen), inputs["model.layers.1.mlp.down_proj"], atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_layers_with_the_largest_values_are_kept_largest_first(bases):
    model, tokenizer = bases["fp32"].model, bases["fp32"].tokenizer
    every, _, _ = largest_inputs(model, tokenizer, TEXTS, keep=100)
    expected = sorted((x.abs().max().item() for x in every.values()), reverse=True)[:3]
    assert [x.abs().max().item() for x in largest_inputs(model, tokenizer, TEXTS)[0].values()] == expected


def test_the_whole_part_prints_what_it_returns(bases, capsys):
    found = show_activations(bases["nf4"].model, bases["nf4"].tokenizer)
    printed = capsys.readouterr().out
    json.dumps(found, allow_nan=False)
    assert found["layer"] in found["layers"] and len(found["layers"]) == 3
    assert f"{100 * found['outliers']['mixed']['later']:.2f}%" in printed and "codes are the same" in printed
