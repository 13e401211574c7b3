"""llama.cpp/export.py: an adapter becomes GGUF files, or one line says why not. What needs the built tools is skipped without them."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import ROOT

from qlora.cli import UsageError, UserError

sys.path.insert(0, str(ROOT / "llama.cpp"))
import export  # noqa: E402
from qlora.gguf_files import check_metadata  # noqa: E402

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
    assert sorted(p.name for p in out.iterdir() if p.name != ".lock") == ["Modelfile", "export.json", f"{trained.name}-Q8_0.gguf", f"{trained.name}-f16.gguf"]
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
        check_metadata(next(out.glob("*base-f16.gguf")), other)


@built
def test_adapters_of_one_base_share_it_in_one_folder(tmp_path, trained):
    """Each adapter's own files stay known; the Modelfile names the one exported last."""
    out, written = tmp_path / "out", set()
    folders = [changed(trained, tmp_path / name, lora_alpha=alpha) for name, alpha in (("a", 32), ("b", 64))]
    for folder in folders:
        notes = json.loads((folder / "qlora.json").read_text())
        (folder / "qlora.json").write_text(json.dumps(notes | {"base": notes["base"] | {"revision": "r1"}}))
        export.main(["--adapter", str(folder), "--lora", "--output-dir", str(out)])
        base = next(out.glob("*-base-f16.gguf"))
        written.add(base.stat().st_mtime_ns)
    assert len(written) == 1
    for folder in folders:
        known = export.recorded(out, export.read(export.ExportSettings(folder)))
        assert sorted(known) == sorted([base.name, f"{folder.name}-lora-f16.gguf"])
    assert "ADAPTER ./b-lora-f16.gguf" in (out / "Modelfile-lora").read_text()


@built
def test_an_importance_matrix_comes_from_the_training_prompts(tmp_path, trained, tokenizer, monkeypatch):
    from gguf import GGUFReader

    from qlora.data import load_rows, split

    texts, tool = [], export.tool

    def watched(name, *arguments):
        if name == "llama-imatrix":
            texts.append(Path(arguments[arguments.index("-f") + 1]).read_text())
        tool(name, *arguments)

    monkeypatch.setattr(export, "tool", watched)
    out = tmp_path / "out"
    export.main(["--adapter", str(trained), "--types", "Q4_0", "--imatrix", "--output-dir", str(out)])
    fields = GGUFReader(out / f"{trained.name}-Q4_0-imatrix.gguf").fields
    assert fields["quantize.imatrix.chunks_count"].contents() > 0
    training, held_out = split(load_rows("imdb"), 16, 8, 42)
    assert len(texts) == 1 and texts[0].count("<|im_start|>assistant") == 16
    ends = lambda rows: [row.text.split()[-1] in texts[0] for row in rows]  # noqa: E731
    assert all(ends(training)) and not all(ends(held_out))


def test_an_adapter_whose_tokenizer_is_incomplete_is_one_line(tmp_path, trained, pretend_built):
    adapter = changed(trained, tmp_path / "adapter")
    (adapter / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer files are incomplete"):
        export.main(["--adapter", str(adapter), "--lora", "--output-dir", str(tmp_path / "out")])


@built
def test_a_lost_chat_template_is_named(tmp_path, trained):
    adapter = changed(trained, tmp_path / "adapter")
    (adapter / "chat_template.jinja").unlink()
    export_of_trained = tmp_path / "out"
    export.main(["--adapter", str(trained), "--lora", "--output-dir", str(export_of_trained)])
    with pytest.raises(UserError, match="copy chat_template.jinja there"):
        check_metadata(next(export_of_trained.glob("*base-f16.gguf")), adapter)


@built
def test_what_a_killed_export_left_is_removed_and_two_at_once_are_refused(tmp_path, trained):
    from filelock import FileLock

    out = tmp_path / "out"
    (out / ".export-dead").mkdir(parents=True)
    (out / ".export-dead" / "half.gguf").touch()
    with FileLock(out / ".lock"), pytest.raises(UserError, match="another run"):
        export.main(["--adapter", str(trained), "--lora", "--output-dir", str(out)])
    export.main(["--adapter", str(trained), "--lora", "--output-dir", str(out)])
    assert not list(out.glob(".export-*"))


def test_the_next_command_asks_as_training_did(tmp_path, trained):
    assert export.question(trained).startswith(" -sys 'You judge movie reviews.' -st ") and "positive or negative?" in export.question(trained)
    dated = changed(trained, tmp_path / "dated")
    template = dated / "chat_template.jinja"
    template.write_text("{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}" + template.read_text())
    assert """--chat-template-kwargs '{"date_string": "26 Jul 2024"}'""" in export.question(dated)


def test_a_files_record_goes_before_the_file(tmp_path, trained):
    # Killed between the two, an export must not leave a new file under an older adapter's record
    out = tmp_path / "out"
    out.mkdir()
    export.write_record(out, {name: {"kind": "merged", "type": "Q8_0", "of": "an older one"} for name in ("a.gguf", "b.gguf")})
    for name in ("a.gguf", "b.gguf"):
        (out / name).touch()
    export.move_in(out / "a.gguf", out)
    assert set(export.known_files(out)) == {"b.gguf"}
