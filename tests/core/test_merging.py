"""How much of an adapter a merge keeps, in which dtype, and when it is refused."""

import json
import shutil

import pytest
import torch
from conftest import here

from qlora import merging
from qlora.adapters import load_trained, read_adapter

SCRIPT = "qlora_inference.py"


@pytest.fixture(scope="module")
def weakened(trained, tmp_path_factory):
    """A function of a strength: the trained adapter with its update scaled by it."""

    def make(strength: float):
        folder = tmp_path_factory.mktemp("weak") / "adapter"
        shutil.copytree(trained, folder)
        (folder / "complete.json").unlink()  # what follows changes a file of its list
        config = json.loads((folder / "adapter_config.json").read_text())
        config["lora_alpha"] *= strength
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make


def merged(folder, dtype="auto"):
    adapter = read_adapter(folder)
    model, base = load_trained(adapter, lane="fp32")
    return merging.merged_model("dequantized", adapter, base, dtype), model, base


def test_fp16_keeps_a_weak_update_and_bf16_adds_more_noise(trained, weakened):
    (_, strong), *_ = merged(trained)
    weak = weakened(0.002 / strong.size)  # 0.2% of the weights
    (_, half), *_ = merged(weak)
    (_, brain), *_ = merged(weak, "bf16")
    assert half.dtype == "fp16" and half.size == pytest.approx(0.002, rel=0.01)
    assert half.whole > 0.99 and abs(1 - half.whole) < abs(1 - brain.whole)
    assert brain.noise == pytest.approx(8 * half.noise, rel=0.1)  # three bits fewer


def test_what_is_kept_is_the_slope_that_a_hand_calculation_gives(trained):
    (model, kept), trained_model, base = merged(trained, "bf16")
    layer = dict(trained_model.get_base_model().named_modules())["model.layers.0.mlp.down_proj"]
    frozen = merging.dequantized(layer.get_base_layer()).float()
    update = layer.get_delta_weight(layer.active_adapters[0]).float()
    written = model.get_submodule("model.layers.0.mlp.down_proj").weight
    assert written.dtype == torch.bfloat16 and torch.equal(written, (frozen + update).bfloat16())
    left = written.float() - frozen.bfloat16().float()
    assert ((left * update).sum() / update.square().sum()).item() >= kept.worst - 1e-6


def test_too_weak_an_update_is_refused_unless_forced(weakened, tmp_path):
    folder, out = weakened(1e-7), tmp_path / "merged"
    done = here(SCRIPT, "--adapter", folder, "--merge", out, "--merge-dtype", "bf16")
    assert done.returncode == 1 and not out.exists(), done.stderr
    assert "of the adapter's update would be left" in done.stderr and "--merge-dtype fp16" in done.stderr
    done = here(SCRIPT, "--adapter", folder, "--merge", out, "--merge-dtype", "bf16", "--force")
    assert done.returncode == 0 and (out / "config.json").exists(), done.stderr


def test_fp32_loses_nothing(weakened, tmp_path):
    folder, out = weakened(1e-3), tmp_path / "merged"
    done = here(SCRIPT, "--adapter", folder, "--merge", out, "--merge-dtype", "fp32")
    assert done.returncode == 0 and "100.00% of the update" in done.stderr, done.stderr
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_numbers_too_large_for_fp16_are_written_in_bf16(trained, monkeypatch, capsys):
    # the drift of a model whose hidden states overflow: logits are not finite in fp16
    real = merging.logits_of

    def overflows(model, prompts, base):
        return real(model, prompts, base) * (float("inf") if model.dtype == torch.float16 else 1)

    monkeypatch.setattr(merging, "logits_of", overflows)
    (model, kept), *_ = merged(trained)
    assert kept.dtype == "bf16" and model.dtype == torch.bfloat16
    assert "do not fit into fp16" in capsys.readouterr().err
