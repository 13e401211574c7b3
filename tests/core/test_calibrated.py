"""GPTQ and AWQ: against rounding to the nearest where it must be equal, and where it must be better."""

import json

import pytest
import torch

from qlora import calibrated as c
from qlora.cli import UsageError, UserError
from qlora.hardware import detect
from qlora.lab import compare
from qlora.loading import load_base
from qlora.measures import relative_error
from qlora.packed import METHODS
from qlora.weights import linear_layers

FP32 = detect("fp32", lane="fp32")


@pytest.fixture
def weight():
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def inputs():
    """Inputs that go together (rank 16 and a little noise), some much larger than others."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(512, 16, generator=draw) @ torch.randn(16, 64, generator=draw)
    x += 0.1 * torch.randn(512, 64, generator=draw)
    x[:, ::9] *= 8
    return x


def lost(x, weight, values) -> float:
    return relative_error(x @ weight.T, x @ values.T)


def test_the_grid_spans_each_group_and_holds_zero(weight):
    codes, scales, zeros, values = c.round_groups(weight, 32)
    assert codes.min() == 0 and codes.max() == 15 and zeros.min() >= 1
    each = torch.arange(64) // 32
    assert torch.allclose(values, (codes - zeros[:, each]) * scales[:, each])
    assert ((values - weight).abs() <= 0.75 * scales[:, each]).all()
    assert (c.round_groups(torch.zeros(2, 64), 32)[3] == 0).all()


def test_gptq_of_inputs_that_have_nothing_in_common_is_rounding(weight):
    made, nearest = c.gptq(weight, torch.eye(64), 32), c.round_groups(weight, 32)
    for ours, theirs in zip(made, nearest):
        assert torch.equal(ours, theirs)


def test_gptq_loses_less_of_what_is_computed_and_more_of_the_weights(weight, inputs):
    codes, scales, zeros, values = c.gptq(weight, inputs.T @ inputs, 32)
    nearest = c.round_groups(weight, 32)
    assert lost(inputs, weight, values) < 0.5 * lost(inputs, weight, nearest[3])
    assert relative_error(weight, values) > relative_error(weight, nearest[3])
    each = torch.arange(64) // 32
    assert torch.equal(values, (codes - zeros[:, each]) * scales[:, each])
    assert torch.equal(scales, nearest[1]) and codes.min() >= 0 and codes.max() <= 15


def test_gptq_takes_an_input_that_is_always_zero(weight, inputs):
    inputs[:, 3] = 0
    assert c.gptq(weight, inputs.T @ inputs, 32)[3].isfinite().all()


def test_awq_stretches_what_meets_large_inputs(weight, inputs):
    s = c.awq_scale([weight], inputs.T @ inputs, 32)
    large = torch.zeros(64, dtype=torch.bool)
    large[::9] = True
    assert s[large].min() > s[~large].max()
    values = c.round_groups(weight * s, 32)[3] / s
    assert lost(inputs, weight, values) < lost(inputs, weight, c.round_groups(weight, 32)[3])


def test_folding_changes_weights_but_not_what_the_layer_computes(tiny_folder):
    lm = load_base(str(tiny_folder), "fp32", FP32).model
    rows = torch.randint(100, 40_000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, layer = lm(input_ids=rows).logits, lm.model.layers[0]
        own = {name: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        with c.grams(own) as found:
            lm(input_ids=rows)
        weights = {name: m.weight.clone() for name, m in own.items()}
        columns, out = c.fold(layer, found, 32)
        assert torch.allclose(lm(input_ids=rows).logits, before, atol=1e-5)
        for name, m in own.items():
            undone = m.weight / columns.get(name, 1.0)
            undone = undone * out[name][:, None] if name in out else undone
            assert torch.allclose(undone, weights[name], atol=1e-6), name
        # What was gathered has to be what the layers read now.
        with c.grams(own) as again:
            lm(input_ids=rows)
    assert set(columns) == set(own) - {"self_attn.o_proj"} and set(out) == {"mlp.up_proj"}
    for name in columns:
        assert torch.allclose(again[name], found[name], rtol=1e-3, atol=1e-3), name


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_the_comparison_is_made_once_and_kept(tiny_folder, tmp_path, monkeypatch, method, capsys):
    monkeypatch.setattr(c, "MODELS_DIR", tmp_path)
    wanted = {"eval_samples": 4, "seed": 42, "calibration": (8, 32, 32)}
    first = compare.compare(str(tiny_folder), ("fp32", method), **wanted)["rows"][1]
    assert "kept in" in capsys.readouterr().err
    second = compare.compare(str(tiny_folder), ("fp32", method), **wanted)
    assert "made before" in capsys.readouterr().err
    row = second["rows"][1]
    same = ("weight_error", "kl", "perplexity", "calibration_seconds")
    assert [row[key] for key in same] == [first[key] for key in same]
    assert row["bits_linear"] == pytest.approx(4 + (16 + 8) / 32)  # a scale and a zero for 32 inputs
    assert 0.05 < row["weight_error"] < 0.25 and len(second["errors"][method]) == 14
    (folder,) = tmp_path.glob("tiny-*")
    notes = json.loads((folder / c.NOTES).read_text())
    assert notes["rows"] == 8 and notes["tokens_per_row"] == 32


def test_what_can_not_be_done_is_said_in_a_line(tiny_folder, tokenizer):
    base = load_base(str(tiny_folder), "fp32", FP32)
    rows = torch.ones(8, 32, dtype=torch.long)
    with pytest.raises(UserError, match="--group-size 48 does not divide the 64 inputs.*; 64, 32, 16 would"):
        c.calibrated_folder(base, rows, "gptq", 48)
    base.model.__class__ = type("GemmaForCausalLM", (type(base.model),), {})
    with pytest.raises(UserError, match="this is a GemmaForCausalLM: use gptq"):
        c.calibrated_folder(base, rows, "awq", 32)
    with pytest.raises(UsageError, match=r"only \d+ training reviews have 3000 tokens, 5000 are wanted"):
        c.calibration_ids(tokenizer, 5000, 3000, 16, 42)


def test_calibration_reads_no_row_that_training_holds_out(tokenizer):
    from config import EVAL_SAMPLES
    from qlora.data import load_rows, split
    from qlora.prompts import text_ids

    held_out = split(load_rows("imdb"), 0, EVAL_SAMPLES, 42)[1]
    ids = {tuple(text_ids(tokenizer, row.text)[:64]) for row in held_out}
    chosen = c.calibration_ids(tokenizer, 64, 64, 16, 42)
    assert chosen.shape == (64, 64) and not ids & set(map(tuple, chosen.tolist()))


def test_other_libraries_read_the_folder(tiny_folder, tmp_path, monkeypatch):
    """By transformers' own way, which needs gptqmodel: not among the requirements."""
    pytest.importorskip("gptqmodel")
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(c, "MODELS_DIR", tmp_path)
    rows = torch.randint(100, 40_000, (8, 32), generator=torch.Generator().manual_seed(0))
    folder = c.calibrated_folder(load_base(str(tiny_folder), "fp32", FP32), rows, "gptq", 32)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not any(isinstance(m, torch.nn.Linear) for _, m in linear_layers(theirs))
    with torch.no_grad():
        wanted = load_base(str(folder), "gptq", FP32).model(input_ids=rows).logits
        assert torch.allclose(theirs(input_ids=rows).logits, wanted, atol=0.01)
