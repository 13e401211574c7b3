"""Runs with --qat: what is saved, resumed, loaded and merged is the model that was trained."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_RUN, here
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from peft import LoraConfig, PeftModel, get_peft_model

import qlora_finetune
import qlora_inference
from qlora import merging, processes, qat
from qlora.adapters import NOTES, WEIGHTS, load_trained, read_adapter
from qlora.cli import UsageError
from qlora.files import SEAL
from qlora.hardware import detect
from qlora.loading import load_base
from qlora.training import guards as g

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
RATE = ("--learning-rate", 0.02)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    """A complete run with --qat Q4_0."""
    out = tmp_path_factory.mktemp("qat") / "by_grid"
    done = here(
        "qlora_finetune.py", "--model", tiny_folder, *SMALL_RUN, *RATE, "--qat", "Q4_0", "--output-dir", out
    )
    assert done.returncode == 0, done.stderr
    assert "the libraries' own: quantization-aware training" in done.stderr
    return out


def loss_of(model) -> float:
    torch.manual_seed(1)
    ids = torch.randint(5, 2000, (8, 48))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_the_quantized_merge_is_what_was_trained(run):
    adapter = read_adapter(run)
    model, base = load_trained(adapter, lane="fp32")
    assert adapter.qat == "Q4_0" and len(qat.grid_layers(model)) == 14
    trained = loss_of(model)
    with qat.without_grid(model):
        unrounded = abs(loss_of(model) - trained)
    names = [name.removeprefix("base_model.model.") for name, _ in qat.grid_layers(model)]
    for dtype in ("fp32", "fp16"):
        merged = merging.merged_model("dequantized", adapter, base, dtype)[0].float()
        for name in names:
            weight = merged.get_submodule(name).weight.data
            file = dequantize(quantize(weight.numpy(), Type.Q4_0), Type.Q4_0)
            weight.copy_(torch.from_numpy(file))
        off = abs(loss_of(merged) - trained)
        assert off < 0.002 and off < unrounded / 3


def test_reports_name_the_grid_and_peft_alone_loads_the_adapter(run, tiny_folder):
    report = json.loads((run / "report.json").read_text())
    assert report["settings"]["qat"] == "Q4_0" and all(guard["passed"] for guard in report["guards"])
    assert "Trained for Q4_0: every merged weight" in (run / "README.md").read_text()
    assert json.loads((run / NOTES).read_text())["qat"] == "Q4_0"
    model, base = load_trained(read_adapter(run), lane="fp32")
    with qat.without_grid(model):
        lora = model(IDS).logits
    peft = PeftModel.from_pretrained(load_base(str(tiny_folder), "nf4", base.hardware).model, run).eval()
    torch.testing.assert_close(peft(IDS).logits, lora, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(IDS).logits, lora, rtol=1e-2)


def test_a_run_resumes_to_the_same_bytes(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "by_grid")
    shutil.rmtree(again / "checkpoint-4")
    for name in ("report.json", WEIGHTS, SEAL):
        (again / name).unlink()
    done = here("qlora_finetune.py", "--output-dir", again, "--resume")
    assert done.returncode == 0 and "resuming from" in done.stderr, done.stderr
    assert (again / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()


def test_each_adapter_computes_by_its_own_grid_whatever_is_loaded_beside_it(run, trained, monkeypatch):
    found: dict = {}

    def keep(s, chosen, model, base):
        for adapter in chosen:
            model.set_adapter(adapter.peft_name)
            found[adapter.name] = model(IDS).logits

    monkeypatch.setattr(qlora_inference, "answer", keep)

    def logits(*folders) -> dict:
        found.clear()
        flags = [flag for folder in folders for flag in ("--adapter", folder)]
        done = here("qlora_inference.py", *flags, "--lane", "fp32", "--compare", "Why?")
        assert done.returncode == 0, done.stderr
        assert ("by_grid, through the grid of Q4_0" in done.stderr) == (run in folders)
        return dict(found)

    right = {
        folder.name: load_trained(read_adapter(folder), lane="fp32")[0](IDS).logits
        for folder in (run, trained)
    }
    for folders in ((run,), (run, trained), (trained, run)):
        for name, given in logits(*folders).items():
            torch.testing.assert_close(given, right[name], rtol=1e-4, atol=1e-5)


def test_a_merge_says_what_is_still_to_be_done(run, tmp_path):
    done = here("qlora_inference.py", "--adapter", run, "--merge", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert "trained through the grid of Q4_0, which quantizing to Q4_0 applies" in done.stderr


def test_notes_with_an_unknown_grid_are_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "by_grid")
    (folder / SEAL).unlink()
    notes = json.loads((folder / NOTES).read_text())
    (folder / NOTES).write_text(json.dumps(notes | {"qat": "Q3"}))
    done = here("qlora_inference.py", "--adapter", folder, "Why?")
    assert done.returncode == 1 and NOTES in done.stderr.splitlines()[-1], done.stderr


def test_a_sharded_base_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "is_sharded", lambda: True)
    with pytest.raises(UsageError, match="--qat Q8_0 .*: not with the base sharded"):
        qlora_finetune.read_settings(["--qat", "Q8_0"])


@pytest.fixture
def model(tiny_folder):
    base = load_base(str(tiny_folder), "nf4", detect(lane="fp32"))
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(base.model, qat.register(config, "Q4_0"))
    qat.use_grid(model, "default", "Q4_0")
    return model


@pytest.mark.parametrize("size", [0.1, 1e-5])
def test_a_guard_sees_a_b_that_is_not_zero_and_would_be_rounded_away(model, size):
    g.starts_as_base(g.Guards(), model, IDS, nullcontext, exact=True)
    b = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight
    b.data[3, 2] = size
    with pytest.raises(g.GuardError, match="starts_as_base"):
        g.starts_as_base(g.Guards(), model, IDS, nullcontext, exact=True)


def test_a_guard_sees_an_adapter_that_is_read_back_without_its_grid(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    g.reloads_same(g.Guards(), model, tmp_path, IDS, nullcontext)
    assert {name for _, layer in qat.grid_layers(model) for name in layer.grids} == {"default"}
    monkeypatch.setattr(qat, "grid_of", lambda *_: None)
    with pytest.raises(g.GuardError, match="reloads_same"):
        g.reloads_same(g.Guards(), model, tmp_path, IDS, nullcontext)
