"""quant_llama32_4bit_lora.py: each part alone, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import make_tiny, script

import quant_llama32_4bit_lora as lab
from qlora.cli import UsageError, UserError


def run_lab(out, *flags):
    return script("quant_llama32_4bit_lora.py", "--output-dir", out, *flags)


def parts_of(out) -> dict:
    return json.loads((out / "quantization.json").read_text())


def test_the_plan_needs_a_config_and_nothing_else(tmp_path, tiny_folder):
    config = tmp_path / "config.json"
    config.write_text((tiny_folder / "config.json").read_text())
    done = run_lab(tmp_path / "out", "--plan", "--model", config, "--batch-size", "2", "--max-length", "64")
    assert done.returncode == 0 and done.stderr.startswith("device "), done.stderr  # no library says something before
    plan = parts_of(tmp_path / "out")["plan"]["result"]
    assert plan["job"]["batch_size"] == 2 and plan["job"]["length"] == 64
    assert [row["card"] for row in plan["cards"]][:2] == ["T4 16", "RTX 3060 12"]
    assert "llama-3.2-3b" in done.stdout and "12.851" in done.stdout  # the course's figures beside it


def test_parts_of_earlier_runs_stay_in_quantization_json(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    lab.main(["--ledger", "--model", str(tiny_folder), "--output-dir", str(out)])
    lab.main(["--ledger", "--architecture", "--model", str(tiny_folder), "--output-dir", str(out), "--target-modules", "lite"])
    parts = parts_of(out)
    assert set(parts) == {"ledger", "load", "architecture"}
    assert parts["ledger"]["settings"]["lora_r"] == 32 and parts["ledger"]["settings"]["target_modules"] == "attention"
    # attention r 32 on 64 wide layers, two of them: q and o 32 (64 + 64), k and v 32 (64 + 32)
    assert parts["ledger"]["result"]["parameters"] == 2 * (2 * 32 * 128 + 2 * 32 * 96)


def test_untrained_and_sampling_on_one_load(tmp_path, tiny_folder, capsys):
    lab.main(["--untrained", "--sampling", "--model", str(tiny_folder), "--output-dir", str(tmp_path / "out")])
    assert "the base's, bit for bit" in capsys.readouterr().out
    assert (tmp_path / "out" / "next_token.png").read_bytes()[:4] == b"\x89PNG"
    assert set(parts_of(tmp_path / "out")) == {"load", "untrained", "sampling"}


def test_datatypes_draw_their_levels(tmp_path, tiny_folder):
    lab.main(["--datatypes", "--model", str(tiny_folder), "--output-dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "levels.png").stat().st_size > 10_000
    assert parts_of(tmp_path / "out")["datatypes"]["result"]["errors"]["equals_library"] == {"fp4": True, "nf4": True}


def test_a_trained_adapter_is_measured_by_the_ledger(tmp_path, trained, capsys):
    lab.main(["--ledger", "--adapter", str(trained), "--model", json.loads((trained / "report.json").read_text())["base"]["name"],
              "--output-dir", str(tmp_path / "out")])
    matrices = parts_of(tmp_path / "out")["ledger"]["result"]["trained"]["matrices"]
    assert len(matrices) == 14 and all(0 < m["ratio"] and 1 <= m["effective_rank"] <= 16 for m in matrices)
    foreign = shutil.copytree(trained, tmp_path / "foreign")
    (foreign / "qlora.json").unlink()
    with pytest.raises(UserError, match="no qlora.json in it"):
        lab.main(["--ledger", "--adapter", str(foreign), "--output-dir", str(tmp_path / "out")])


@pytest.mark.parametrize("flags, words", [
    (["--compare", "nf5"], "no such precision"),
    (["--lora-r", "0"], "rank"),
    (["--prompt", " "], "is empty"),
    (["--batch-size", "0"], "at least 1"),
    (["--plan", "--model", "no/where.json"], "config"),
    (["--target-modules", "wq", "--ledger"], "down_proj"),
    (["--ledger", "--adapter", "nowhere"], "no such folder"),
])
def test_bad_flags_end_in_one_line(tmp_path, flags, words):
    with pytest.raises(UsageError, match=words):
        lab.main([*flags, "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_file_of_someone_elses_is_not_overwritten(tmp_path, tiny_folder):
    (tmp_path / "quantization.json").write_text("my notes")
    with pytest.raises(UsageError, match="not written by this script"):
        lab.main(["--ledger", "--model", str(tiny_folder), "--output-dir", str(tmp_path)])
    assert (tmp_path / "quantization.json").read_text() == "my notes"


def test_rows_that_are_not_whole_blocks_are_refused_in_4_bits_on_a_cpu(tmp_path, tokenizer):
    """bitsandbytes 0.50.2 reads such weights back wrong; load_base and the demo say so instead of training on them."""
    import torch
    from bitsandbytes import functional

    from qlora.hardware import detect
    from qlora.loading import load_base

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    back = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    assert (back - weight).norm() / weight.norm() > 0.2  # when this fails, the bug is gone and so may the refusal be
    folder = make_tiny(tmp_path / "narrow", tokenizer, hidden_size=96, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(UserError, match="96 wide"):
        load_base(str(folder), "nf4", detect())
    load_base(str(folder), "bf16", detect())


@pytest.mark.parametrize("kind", ["t5", "bert", "mamba"])
def test_what_is_no_such_decoder_is_refused_in_one_line(tmp_path, kind):
    from transformers import AutoConfig

    AutoConfig.for_model(kind).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=f"a {kind} model can't be planned"):
        lab.main(["--plan", "--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "out")])


def test_experts_that_nothing_quantizes_are_told(tmp_path, capsys):
    from transformers import MixtralConfig

    MixtralConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=1000,
                  num_local_experts=4).save_pretrained(tmp_path / "model")
    lab.main(["--plan", "--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "out")])
    assert "in no linear layer" in capsys.readouterr().out


def test_the_folder_is_looked_at_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        lab.main(["--output-dir", str(tmp_path / "file" / "sub")])
    (tmp_path / "quantization.json").write_text("[1]")
    with pytest.raises(UsageError, match="not written by this script"):
        lab.main(["--output-dir", str(tmp_path)])
