"""llama.cpp/export.py: an adapter becomes GGUF files, or one line says why not. What needs the built tools is skipped without them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import namedtuple

import pytest
from conftest import ROOT

from qlora.cli import UsageError, UserError

sys.path.insert(0, str(ROOT / "llama.cpp"))
import export  # noqa: E402

built = pytest.mark.skipif(not (export.BIN / "llama-quantize").exists(), reason="llama.cpp/build.sh has not run")


@pytest.fixture
def pretend_built(tmp_path, monkeypatch):
    """Empty files where the tools would be."""
    for name in ("llama-quantize", "convert_hf_to_gguf.py"):
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools" / name).touch()
    monkeypatch.setattr(export, "BIN", tmp_path / "tools")
    monkeypatch.setattr(export, "SOURCE", tmp_path / "tools")


def changed(trained, folder, **config):
    """A copy of the trained adapter with other words in its adapter_config.json."""
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_without_the_tools_it_says_how_to_get_them(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(export, "BIN", tmp_path / "nowhere")
    with pytest.raises(UserError, match="build.sh"):
        export.main(["--adapter", str(trained), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"alpha_pattern": {"q_proj": 4}}])
def test_what_a_lora_file_cannot_hold_is_refused(tmp_path, trained, pretend_built, config):
    adapter = changed(trained, tmp_path / "adapter", **config)
    with pytest.raises(UserError, match="merged"):
        export.main(["--adapter", str(adapter), "--lora", "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, trained, pretend_built, monkeypatch):
    monkeypatch.setattr(export.shutil, "disk_usage", lambda _: namedtuple("usage", "total used free")(1, 1, 1000))
    with pytest.raises(UserError, match="are free"):
        export.main(["--adapter", str(trained), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_flags_that_contradict_each_other(tmp_path):
    with pytest.raises(UsageError, match="imatrix"):
        export.main(["--lora", "--imatrix", "--output-dir", str(tmp_path / "out")])


@built
def test_a_merged_adapter_becomes_quantized_files_with_its_template(tmp_path, trained, tokenizer):
    from gguf import GGUFReader

    out = tmp_path / "out"
    export.main(["--adapter", str(trained), "--types", "Q8_0", "--output-dir", str(out)])
    assert sorted(p.name for p in out.iterdir()) == ["Modelfile", "export.json", f"{trained.name}-Q8_0.gguf", f"{trained.name}-f16.gguf"]
    fields = GGUFReader(out / f"{trained.name}-Q8_0.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert (out / "Modelfile").read_text().splitlines()[0] == f"FROM ./{trained.name}-Q8_0.gguf"
    assert "ADAPTER" not in (out / "Modelfile").read_text()


@built
@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_file_carries_the_scaling_that_llama_cpp_expects(tmp_path, trained, rslora):
    """llama.cpp multiplies by alpha/r whatever the adapter says; rsLoRA's alpha/sqrt(r) has to be written as alpha sqrt(r)."""
    from gguf import GGUFReader

    adapter = changed(trained, tmp_path / "adapter", use_rslora=rslora)
    config = json.loads((adapter / "adapter_config.json").read_text())
    export.main(["--adapter", str(adapter), "--lora", "--output-dir", str(tmp_path / "out")])
    alpha = GGUFReader(tmp_path / "out" / "adapter-lora-f16.gguf").fields["adapter.lora.alpha"].contents()
    assert alpha == pytest.approx(config["lora_alpha"] * (math.sqrt(config["r"]) if rslora else 1))
    assert "ADAPTER ./adapter-lora-f16.gguf" in (tmp_path / "out" / "Modelfile-lora").read_text()


@built
def test_a_file_whose_template_differs_is_refused(tmp_path, trained):
    out = tmp_path / "out"
    export.main(["--adapter", str(trained), "--lora", "--output-dir", str(out)])
    other = changed(trained, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match="chat_template"):
        export.check_metadata(next(out.glob("*base-f16.gguf")), other)
