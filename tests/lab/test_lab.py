"""quant_llama32_4bit_lora.py: each part alone, what it writes, and what it refuses."""

import dataclasses
import json
import shutil

import pytest
import torch
from bitsandbytes import functional
from conftest import make_tiny, script
from transformers import AutoConfig, MixtralConfig

import quant_llama32_4bit_lora as lab
from config import DemoSettings
from qlora.cli import UsageError, UserError
from qlora.files import SEAL
from qlora.hardware import detect
from qlora.loading import load_base, quantization_config


def run_lab(out, *flags) -> dict:
    """Run the script in this process; what it left in quantization.json."""
    lab.main([*map(str, flags), "--output-dir", str(out)])
    return parts_of(out)


def parts_of(out) -> dict:
    return json.loads((out / "quantization.json").read_text())


def test_the_plan_needs_a_config_and_nothing_else(tmp_path, tiny_folder):
    config, out = tmp_path / "config.json", tmp_path / "out"
    config.write_text((tiny_folder / "config.json").read_text())
    flags = ("--plan", "--model", config, "--batch-size", "2", "--max-length", "64")
    done = script("quant_llama32_4bit_lora.py", "--output-dir", out, *flags)
    assert done.returncode == 0 and done.stderr.startswith("device "), done.stderr  # no library speaks first
    plan = parts_of(out)["plan"]["result"]
    assert plan["job"]["batch_size"] == 2 and plan["job"]["length"] == 64
    assert [row["card"] for row in plan["cards"]][:2] == ["T4 16", "RTX 3060 12"]
    assert "llama-3.2-3b" in done.stdout and "12.851" in done.stdout  # the course's figures beside it


def test_the_nf4_written_out_is_the_tables(tmp_path, tiny_folder, monkeypatch):
    given = []

    class Loaded(Exception):
        pass

    def load(name, precision, hardware, quantization):
        given.append((precision, quantization, hardware.dtype))
        raise Loaded

    lab.import_libraries()
    monkeypatch.setattr(lab, "import_libraries", lambda: None)
    monkeypatch.setattr(lab, "load_base", load, raising=False)
    for precision in ("nf4", "int8"):
        with pytest.raises(Loaded):
            run_lab(tmp_path, "--architecture", "--model", tiny_folder, "--precision", precision)
    (_, four_bit, dtype), (_, other, _) = given
    assert four_bit.to_dict() == quantization_config("nf4", dtype).to_dict()
    assert other is None  # load_base takes it from the table


def test_the_settings_that_were_given_are_not_changed():
    lab.import_libraries()
    asked = DemoSettings()
    chosen, _ = lab.choose_model(asked)
    assert asked == DemoSettings() and chosen.precision == "nf4"
    assert chosen == dataclasses.replace(asked, model=chosen.model, precision="nf4") != asked


def test_parts_of_earlier_runs_stay_in_quantization_json(tmp_path, tiny_folder):
    run_lab(tmp_path, "--ledger", "--model", tiny_folder)
    parts = run_lab(
        tmp_path, "--ledger", "--architecture", "--model", tiny_folder, "--target-modules", "lite"
    )
    assert set(parts) == {"ledger", "load", "architecture"}
    assert set(parts["ledger"]) == {"settings", "environment", "result"}
    settings = parts["ledger"]["settings"]
    assert settings["lora_r"] == 32 and settings["target_modules"] == "attention"
    # attention r 32 on 64 wide layers, two of them: q and o 32 (64 + 64), k and v 32 (64 + 32)
    assert parts["ledger"]["result"]["parameters"] == 2 * (2 * 32 * 128 + 2 * 32 * 96)


def test_untrained_and_sampling_on_one_load(tmp_path, tiny_folder, capsys):
    parts = run_lab(tmp_path, "--untrained", "--sampling", "--model", tiny_folder)
    assert "the base's, bit for bit" in capsys.readouterr().out
    assert (tmp_path / "next_token.png").read_bytes()[:4] == b"\x89PNG"
    assert set(parts) == {"load", "untrained", "sampling"}


def test_datatypes_draw_their_levels(tmp_path, tiny_folder):
    result = run_lab(tmp_path, "--datatypes", "--model", tiny_folder)["datatypes"]["result"]
    assert (tmp_path / "levels.png").stat().st_size > 10_000
    assert result["errors"]["equals_library"] == {"fp4": True, "nf4": True}
    assert result["model"]["layers"] == 14 and len(result["activations"]["layers"]) == 3


def test_precisions_are_compared_and_drawn(tmp_path, tiny_folder):
    flags = ("--compare", "bf16", "nf4", "--eval-samples", "4", "--model", tiny_folder)
    result = run_lab(tmp_path, *flags)["compare"]["result"]
    assert [row["precision"] for row in result["rows"]] == ["bf16", "nf4"]
    assert {p.name for p in tmp_path.glob("*.png")} == {"precisions.png", "errors.png"}


def test_a_trained_adapter_is_measured_by_the_ledger(tmp_path, trained):
    model = json.loads((trained / "report.json").read_text())["base"]["name"]
    parts = run_lab(tmp_path / "out", "--ledger", "--adapter", trained, "--model", model)
    matrices = parts["ledger"]["result"]["trained"]["matrices"]
    assert len(matrices) == 14 and all(m["ratio"] > 0 and 1 <= m["effective_rank"] <= 16 for m in matrices)
    foreign = shutil.copytree(trained, tmp_path / "foreign", ignore=shutil.ignore_patterns(SEAL))
    (foreign / "qlora.json").unlink()
    with pytest.raises(UserError, match="no qlora.json in it"):
        run_lab(tmp_path / "out", "--ledger", "--adapter", foreign)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--compare", "nf5"], "nf5: no such precision; choose from fp32, .*torchao-fp8"),
        (["--lora-r", "0"], "from 1 to"),
        (["--prompt", " "], "is empty"),
        (["--batch-size", "0"], "from 1 to"),
        (["--plan", "--model", "no/where.json"], "config"),
        (["--target-modules", "wq", "--ledger"], "down_proj"),
        (["--ledger", "--adapter", "nowhere"], "no such folder; train first .qlora_finetune.py.$"),
        (["--plan", "--adapter", "nowhere"], "only --ledger reads it"),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path, flags, words):
    with pytest.raises(UsageError, match=words):
        run_lab(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_file_of_someone_elses_is_not_overwritten(tmp_path, tiny_folder):
    (tmp_path / "quantization.json").write_text("my notes")
    with pytest.raises(UserError, match="is damaged .*; move it away"):
        run_lab(tmp_path, "--ledger", "--model", tiny_folder)
    assert (tmp_path / "quantization.json").read_text() == "my notes"


def test_the_folder_is_looked_at_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        run_lab(tmp_path / "file" / "sub")
    (tmp_path / "quantization.json").write_text("[1]")
    with pytest.raises(UserError, match="is damaged .*; move it away"):
        run_lab(tmp_path)


def test_rows_that_are_not_whole_blocks_are_refused_in_4_bits_on_a_cpu(tmp_path, tokenizer):
    """bitsandbytes 0.50.2 reads such weights back wrong; load_base says so instead of training on them."""
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    back = functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4"))
    error = (back - weight).norm() / weight.norm()
    assert error > 0.2  # when this fails, the bug is gone and so may the refusal be
    folder = make_tiny(tmp_path / "narrow", tokenizer, hidden_size=96)
    with pytest.raises(UserError, match="96 wide"):
        load_base(str(folder), "nf4", detect())
    load_base(str(folder), "bf16", detect())


@pytest.mark.parametrize("kind", ["t5", "bert", "mamba"])
def test_what_is_no_such_decoder_is_refused_in_one_line(tmp_path, kind):
    AutoConfig.for_model(kind).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=f"a {kind} model can't be planned|encoder-decoder"):
        run_lab(tmp_path / "out", "--plan", "--model", tmp_path / "model")


def test_experts_that_nothing_quantizes_are_told(tmp_path, capsys):
    widths = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 1000}
    heads = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    MixtralConfig(**widths, **heads).save_pretrained(tmp_path / "model")
    flags = ("--plan", "--model", tmp_path / "model", "--precision", "bf16")  # also where a CPU has no bf16
    run_lab(tmp_path / "out", *flags)
    assert "in no linear layer" in capsys.readouterr().out
