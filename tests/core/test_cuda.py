"""Every way in which a GPU can't be used: one line that names what was found and what to do.

The driver is a small program of that name on the PATH; torch's own answers are set by hand.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, script

from qlora import cuda, hardware
from qlora.cli import UserError

T4 = "Tesla T4, 535.104.05"


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A machine whose nvidia-smi prints this and ends with that code; without it there is none."""

    def install(prints: str, code: int = 0) -> Path:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nprintf '%s\\n' '{prints}'\nexit {code}\n")
        program.chmod(0o755)
        return tmp_path

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    return install


def trouble(monkeypatch, built_for: str | None) -> str:
    monkeypatch.setattr(torch.version, "cuda", built_for)
    found = hardware.detect()
    assert found.device == "cpu"
    with pytest.raises(UserError) as refused:
        hardware.detect(device="cuda")
    text = str(refused.value)
    assert text.startswith("--device cuda: ") and "\n" not in text
    assert found.unused in ("", text.removeprefix("--device cuda: "))
    return text


def test_no_driver(monkeypatch, driver):
    assert "no NVIDIA driver is installed (no nvidia-smi)" in trouble(monkeypatch, "13.0")
    assert hardware.detect().unused == ""  # a machine without a GPU is not worth a note


def test_no_driver_in_colab_names_the_menu(monkeypatch, driver):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
    assert "Change runtime type" in trouble(monkeypatch, "13.0")


def test_a_driver_without_a_card(monkeypatch, driver):
    driver("")
    assert "the NVIDIA driver is installed, but it sees no GPU" in trouble(monkeypatch, "13.0")


def test_a_driver_that_fails(monkeypatch, driver):
    driver("NVIDIA-SMI has failed because it couldn t communicate with the NVIDIA driver.", 9)
    assert "nvidia-smi says: NVIDIA-SMI has failed" in trouble(monkeypatch, "13.0")


@pytest.mark.parametrize("version, build", [("535.104.05", "cu126"), ("590.10", "cu130")])
def test_torch_without_cuda_names_the_build_for_this_driver(monkeypatch, driver, version, build):
    driver(f"Tesla T4, {version}")
    said = trouble(monkeypatch, None)
    assert f"Tesla T4 with driver {version} is here, but torch" in said and "built without CUDA" in said
    assert f"https://download.pytorch.org/whl/{build}" in said and "+" not in said.split("torch==")[1][:8]


def test_an_old_driver(monkeypatch, driver):
    driver(T4)
    said = trouble(monkeypatch, "13.0")
    assert "torch's CUDA 13.0 needs driver 580 or newer: update the driver" in said and "cu126" in said


def test_a_hidden_card(monkeypatch, driver):
    driver("Tesla T4, 590.10")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES='' hides it: unset it" in trouble(monkeypatch, "13.0")


def test_what_torch_says_itself(monkeypatch, driver):
    import warnings

    driver("Tesla T4, 590.10")
    monkeypatch.setattr(
        torch.cuda, "is_available", lambda: warnings.warn("CUDA unknown error", stacklevel=1) or False
    )
    assert "torch can't use it (CUDA unknown error)" in trouble(monkeypatch, "13.0")


def test_a_card_that_this_torch_has_no_kernels_for(monkeypatch):
    """A P100 on Kaggle: torch says that it is available, and its first kernel fails."""
    card = SimpleNamespace(name="Tesla P100", major=6, minor=0, total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "compute_120"])
    said = cuda.find_trouble().text
    assert "compute capability 6.0" in said and "begins at 7.5" in said and "cu126" in said


def test_the_cpu_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = hardware.detect(device="cpu")
    assert found.device == "cpu" and found.why.startswith("--device cpu; ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", ["qlora_finetune.py", "qlora_inference.py", "quant_llama32_4bit_lora.py"])
def test_every_script_refuses_in_one_line(name, tmp_path, monkeypatch):
    flags = ["--adapter", "none", "hello"] if "inference" in name else ["--output-dir", tmp_path / "out"]
    done = script(name, "--device", "cuda", *flags)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: --device cuda: ") and "Traceback" not in done.stderr
    assert done.stdout == "" and not (tmp_path / "out" / "settings.json").exists()


def test_a_card_that_is_not_used_is_told(driver, monkeypatch, tmp_path):
    path = f"{driver(T4)}:{os.environ['PATH']}"
    done = script("qlora_inference.py", "--adapter", "none", "--model", ROOT / "nothing", env={"PATH": path})
    if torch.version.cuda is None:
        assert "note       a GPU is not used: Tesla T4 with driver 535.104.05 is here" in done.stderr
