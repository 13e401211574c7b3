"""llama.cpp/export.py: an adapter becomes GGUF files, or one line says why not.

What needs the built tools is skipped without them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys

import pytest
import torch
from conftest import ROOT
from gguf import GGUFReader, dequantize

from qlora import qat
from qlora.cli import UsageError, UserError

sys.path.insert(0, str(ROOT / "llama.cpp"))
import export
import gguf_export
import gguf_files
import settings
from gguf_files import check_metadata
from qlora.adapters import load_trained, read_adapter
from qlora.files import PART, SEAL
from settings import BIN

no_tools = pytest.mark.skipif(not (BIN / "llama-quantize").exists(), reason="llama.cpp/build.sh has not run")


def built(test):
    """Needs the built tools, and many seconds for llama.cpp's converters."""
    return no_tools(pytest.mark.slow(test))


@pytest.fixture
def pretend_built(tmp_path, monkeypatch):
    """Empty files where the tools would be."""
    for name in ("llama-quantize", "convert_hf_to_gguf.py"):
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools" / name).touch()
    monkeypatch.setattr(gguf_export, "BIN", tmp_path / "tools")
    monkeypatch.setattr(gguf_export, "SOURCE", tmp_path / "tools")


def changed(trained, folder, **config):
    """A copy of the trained adapter with other words in its adapter_config.json."""
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*", SEAL))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_f16_and_lora_files_need_the_converter_alone(tmp_path, trained, monkeypatch, pretend_built):
    # In Colab a build takes longer than everything else in the notebook.
    monkeypatch.setattr(gguf_export, "BIN", tmp_path / "nowhere")
    for wanted in ({"types": ("f16",)}, {"lora": True}):
        gguf_export.read(settings.ExportSettings(adapter=trained, **wanted))
    monkeypatch.setattr(gguf_export, "SOURCE", tmp_path / "nowhere")
    with pytest.raises(UserError, match="python llama.cpp/source.py"):
        gguf_export.read(settings.ExportSettings(adapter=trained, types=("f16",)))


def test_without_the_tools_it_says_how_to_get_them(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(gguf_export, "BIN", tmp_path / "nowhere")
    with pytest.raises(UserError, match="build.sh"):
        export.main(["--adapter", str(trained), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_build_for_a_gpu_is_tried_before_it_is_used(tmp_path, trained, monkeypatch):
    """build.sh leaves this file where no GPU was, and takes it away where the build worked."""
    (tmp_path / "unproved").write_text("cuda\n")
    for module in (settings, gguf_export):
        monkeypatch.setattr(module, "UNPROVED", tmp_path / "unproved")
    with pytest.raises(UserError, match="not tried yet: run llama.cpp/build.sh here first"):
        export.main(["--adapter", str(trained), "--output-dir", str(tmp_path / "out")])


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"alpha_pattern": {"q_proj": 4}}]
)
def test_what_a_lora_file_cannot_hold_is_refused(tmp_path, trained, pretend_built, config):
    adapter = changed(trained, tmp_path / "adapter", **config)
    with pytest.raises(UserError, match="merged"):
        export.main(["--adapter", str(adapter), "--lora", "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, trained, pretend_built, monkeypatch):
    monkeypatch.setattr(gguf_export, "free_bytes", lambda _: 1000)
    with pytest.raises(UserError, match="are free"):
        export.main(["--adapter", str(trained), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_flags_that_contradict_each_other(tmp_path):
    with pytest.raises(UsageError, match="imatrix"):
        export.main(["--lora", "--imatrix", "--output-dir", str(tmp_path / "out")])


@pytest.fixture(scope="module")
def merged(tmp_path_factory, trained):
    """What `--types Q8_0` writes."""
    out = tmp_path_factory.mktemp("merged") / "out"
    export.main(["--adapter", str(trained), "--types", "Q8_0", "--output-dir", str(out)])
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, trained):
    """(output folder, adapters a and b, times at which their base was written): two adapters of one base.

    b uses rsLoRA. The folder holds what killed exports left.
    """
    folder, times = tmp_path_factory.mktemp("pairs"), []
    out, adapters = folder / "out", [changed(trained, folder / name, use_rslora=name == "b") for name in "ab"]
    for adapter, left in zip(adapters, (f"{PART}dead", f"{PART}dead-too")):
        notes = json.loads((adapter / "qlora.json").read_text())
        (adapter / "qlora.json").write_text(json.dumps(notes | {"base": notes["base"] | {"revision": "r1"}}))
        (out / left).mkdir(parents=True)
        (out / left / "half.gguf").touch()
        export.main(["--adapter", str(adapter), "--lora", "--output-dir", str(out)])
        times.append(next(out.glob("*-base-f16.gguf")).stat().st_mtime_ns)
    return out, adapters, times


@built
def test_a_merged_adapter_becomes_quantized_files_with_its_template(merged, trained, tokenizer):
    from gguf import GGUFReader

    files = [f"{trained.name}-Q8_0.gguf", f"{trained.name}-f16.gguf"]
    assert sorted(p.name for p in merged.iterdir() if p.name != ".lock") == [
        "Modelfile",
        "export.json",
        *files,
    ]
    fields = GGUFReader(merged / f"{trained.name}-Q8_0.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert (merged / "Modelfile").read_text().splitlines()[0] == f"FROM ./{trained.name}-Q8_0.gguf"
    assert "ADAPTER" not in (merged / "Modelfile").read_text()


@built
def test_a_lora_file_carries_the_scaling_that_llama_cpp_expects(pairs):
    """llama.cpp multiplies by alpha/r whatever the adapter says, so rsLoRA's alpha grows by sqrt(r)."""
    from gguf import GGUFReader

    out, adapters, _ = pairs
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    for adapter, factor in zip(adapters, (1, math.sqrt(config["r"]))):
        alpha = GGUFReader(out / f"{adapter.name}-lora-f16.gguf").fields["adapter.lora.alpha"].contents()
        assert alpha == pytest.approx(config["lora_alpha"] * factor)


@built
def test_a_file_whose_template_differs_is_refused(tmp_path, pairs, trained):
    other = changed(trained, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match="chat_template"):
        check_metadata(next(pairs[0].glob("*base-f16.gguf")), other)


@built
def test_a_lost_chat_template_is_named(tmp_path, pairs, trained):
    adapter = changed(trained, tmp_path / "adapter")
    (adapter / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="copy chat_template.jinja from the base"):
        check_metadata(next(pairs[0].glob("*base-f16.gguf")), adapter)


@built
def test_adapters_of_one_base_share_it_in_one_folder(pairs):
    """Each adapter's own files stay known; the Modelfile names the one exported last."""
    out, adapters, times = pairs
    base = next(out.glob("*-base-f16.gguf")).name
    assert len(set(times)) == 1
    for adapter in adapters:
        known = gguf_files.own_files(out, read_adapter(adapter))
        assert sorted(known) == sorted([base, f"{adapter.name}-lora-f16.gguf"])
    assert "ADAPTER ./b-lora-f16.gguf" in (out / "Modelfile-lora").read_text()


@built
def test_what_a_killed_export_left_is_removed(pairs):
    assert not list(pairs[0].glob(f"{PART}*"))


def test_two_exports_at_once_are_refused(tmp_path, trained, pretend_built):
    from filelock import FileLock

    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(UserError, match="another run"):
        export.main(["--adapter", str(trained), "--lora", "--output-dir", str(tmp_path / "out")])


@built
def test_an_importance_matrix_comes_from_the_training_prompts(tmp_path, trained, merged, monkeypatch):
    from gguf import GGUFReader

    from qlora.data import load_rows, split

    texts, execute = [], gguf_export.execute

    def watched(*command):
        if str(command[0]).endswith("llama-imatrix"):
            texts.append(command[command.index("-f") + 1].read_text())
        execute(*command)

    monkeypatch.setattr(gguf_export, "execute", watched)
    out = tmp_path / "out"
    shutil.copytree(merged, out)  # its f16 file is used again
    export.main(["--adapter", str(trained), "--types", "Q4_0", "--imatrix", "--output-dir", str(out)])
    fields = GGUFReader(out / f"{trained.name}-Q4_0-imatrix.gguf").fields
    assert fields["quantize.imatrix.chunks_count"].contents() > 0
    training, held_out = split(load_rows("imdb"), 16, 8, 42)
    assert len(texts) == 1 and texts[0].count("<|im_start|>assistant") == 16
    ends = lambda rows: [row.text.split()[-1] in texts[0] for row in rows]
    assert all(ends(training)) and not all(ends(held_out))


def test_an_adapter_whose_tokenizer_is_incomplete_is_one_line(tmp_path, trained, pretend_built):
    adapter = changed(trained, tmp_path / "adapter")
    (adapter / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer files"):
        export.main(["--adapter", str(adapter), "--lora", "--output-dir", str(tmp_path / "out")])


def test_the_next_command_asks_as_training_did(tmp_path, trained):
    flags = gguf_export.llama_cli_flags(read_adapter(trained))
    assert flags.startswith("-sys 'You judge movie reviews.' -st ") and "positive or negative?" in flags
    dated = changed(trained, tmp_path / "dated")
    template = dated / "chat_template.jinja"
    date = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    template.write_text(date + template.read_text())
    flags = gguf_export.llama_cli_flags(read_adapter(dated))
    assert """--chat-template-kwargs '{"date_string": "26 Jul 2024"}'""" in flags


@no_tools
def test_llama_cli_answers_from_any_file_as_docs_deployment_says(bundled_folder):
    import re
    import shlex
    import subprocess

    from conftest import ROOT

    text = (ROOT / "docs" / "deployment.md").read_text()
    command = re.search(r"^llama\.cpp/build/bin/llama-cli -m models/.*$", text, re.M)[0]
    done = subprocess.run(
        [*shlex.split(command), "-n", "12"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    asked = shlex.split(command)[-1]
    assert done.returncode == 0 and re.search(rf"> {asked}\s+\w+ \w+", done.stdout), done.stdout


def test_a_files_record_goes_before_the_file(tmp_path, trained, monkeypatch):
    # Killed between the two, an export must not leave a new file under an older adapter's record
    out, aside = tmp_path / "out", tmp_path / "aside"
    out.mkdir()
    aside.mkdir()
    old = {"kind": "merged", "type": "Q8_0", "of": "an older one"}
    (out / "export.json").write_text(json.dumps({"files": dict.fromkeys(("a.gguf", "b.gguf"), old)}))
    for file in (out / "a.gguf", out / "b.gguf", aside / "a.gguf"):
        file.touch()

    def killed(part, final):
        os.replace(part, final)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_files, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        gguf_files.place(aside / "a.gguf", out, read_adapter(trained), {"kind": "merged", "type": "Q8_0"})
    assert (out / "a.gguf").exists() and not (aside / "a.gguf").exists()
    assert set(gguf_files.known_files(out)) == {"b.gguf"}


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_K_M", "IQ3_XS", "IQ2_M", "Q2_K_S", "TQ1_0", "TQ2_0", "MXFP4_MOE", "NVFP4", "Q1_0"]
)
def test_types_under_five_bits_are_known_by_their_blocks(kind):
    assert gguf_files.under_five_bits(kind)
    assert not any(map(gguf_files.under_five_bits, ("Q5_0", "Q5_K_M", "Q6_K", "Q8_0", "f16", "bf16", "f32")))


@built
def test_a_file_of_the_type_that_was_trained_for_holds_the_weights_that_were_trained(
    tmp_path, trained, capsys
):
    folder = changed(trained, tmp_path / "adapter")
    notes = json.loads((folder / "qlora.json").read_text())
    (folder / "qlora.json").write_text(json.dumps(notes | {"qat": "Q4_0"}))
    out = tmp_path / "out"
    export.main(["--adapter", str(folder), "--types", "Q4_0", "Q8_0", "--output-dir", str(out)])
    assert "only a merged file" not in capsys.readouterr().err
    assert sorted(p.name for p in out.glob("*.gguf")) == [
        f"adapter-{t}.gguf" for t in ("Q4_0", "Q8_0", "f16")
    ]
    model, _ = load_trained(read_adapter(folder))
    layers = dict(qat.grid_layers(model.get_base_model()))
    file = {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(out / "adapter-Q4_0.gguf").tensors}
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        for i in range(2):
            layer, held = layers[f"model.layers.{i}.{ours}"], file[f"blk.{i}.{theirs}.weight"]
            (adapter,) = layer.lora_A
            same = (layer.rounded(adapter, torch.float32).numpy() == held).mean()
            assert same > 0.9999, same  # sums of W and s B A may end in another last bit
    export.main(["--adapter", str(folder), "--types", "Q8_0", "--output-dir", str(tmp_path / "other")])
    assert "trained through the grid of Q4_0: only a merged file of that type" in capsys.readouterr().err
