"""Which dtype is chosen on which device; CUDA cards are described by hand, since no GPU runs these tests."""

from types import SimpleNamespace

import pytest
import torch

import qlora_finetune
import quant_llama32_4bit_lora
from config import DemoSettings, TrainSettings
from qlora import hardware, processes
from qlora.memory.plan import default_model
from qlora.memory.step import Job


def card(monkeypatch, major: int, minor: int, gib: float) -> None:
    properties = SimpleNamespace(name="a card", major=major, minor=minor, total_memory=int(gib * 2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    # A torch with CUDA would ask the driver at each optimizer step (the name is that of its version).
    for name in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, name, lambda _: None, raising=False)


@pytest.mark.parametrize(
    "capability, dtype, why",
    [
        ((7, 5), torch.float16, "gradient scaler"),
        ((8, 0), torch.bfloat16, "in hardware"),
        ((9, 0), torch.bfloat16, "in hardware"),
    ],
)
def test_dtype_by_compute_capability(monkeypatch, capability, dtype, why):
    card(monkeypatch, *capability, gib=16)
    found = hardware.detect()
    assert (found.device, found.dtype) == ("cuda", dtype) and why in found.why


def test_a_precision_asked_for_is_also_computed_in(monkeypatch):
    card(monkeypatch, 8, 0, gib=16)
    found = hardware.detect("fp16")
    assert found.dtype == torch.float16 and "--precision fp16" in found.why
    assert hardware.detect("int8").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "gib, model", [(2, "llama-3.2-1b"), (6, "llama-3.2-1b"), (8, "llama-3.2-3b"), (80, "llama-3.2-3b")]
)
def test_model_by_memory(monkeypatch, gib, model):
    card(monkeypatch, 8, 6, gib)
    found = hardware.detect()
    chosen, why = default_model(found)
    assert chosen == model and why.startswith("the smallest, though") == (gib == 2)
    assert default_model(found, Job(length=4096))[0] == ("llama-3.2-3b" if gib == 80 else "llama-3.2-1b")


def test_a_run_of_longer_rows_may_need_the_smaller_model(monkeypatch):
    card(monkeypatch, 8, 6, 8)
    monkeypatch.setattr("qlora.hub.config_file", lambda hub_id: None)  # the hub gives it
    for script, settings in (
        (qlora_finetune, TrainSettings(max_length=1024)),
        (quant_llama32_4bit_lora, DemoSettings(max_length=1024)),
    ):
        script.import_libraries()
        assert script.choose_model(settings)[0].model == "llama-3.2-1b"


def test_freed_gpu_memory_is_given_back(monkeypatch):
    # parity.py starts llama-server beside it.
    given_back = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append("cache"))
    hardware.return_freed_memory()
    assert given_back == ["cache"]


def test_one_process_trains_on_one_of_several_gpus_and_says_so(monkeypatch, capsys):
    # transformers would copy the model to all of them at each step (DataParallel).
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    processes.meet("cuda")
    assert "one of 2 GPUs is used" in capsys.readouterr().err
    qlora_finetune.import_libraries()
    monkeypatch.setattr(qlora_finetune, "TrainingArguments", lambda **given: SimpleNamespace(n_gpu=2))
    machine = hardware.Hardware("cuda", "a card", torch.bfloat16, "", 24.0, (8, 6))
    assert qlora_finetune.training_arguments(TrainSettings(), machine)._n_gpu == 1


@pytest.mark.parametrize(
    "rates, lane, dtype",
    [
        ({"fp32": 100.0, "bf16": 400.0}, "bf16", torch.bfloat16),
        ({"fp32": 100.0, "bf16": 110.0}, "fp32", torch.float32),  # not by enough
        ({"fp32": 124.0, "bf16": 73.0}, "fp32", torch.float32),  # a Xeon whose flags name AVX512-BF16
    ],
)
def test_a_trial_chooses_a_processors_products(monkeypatch, rates, lane, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware.lanes, "trial", lambda width, between: rates)
    found = hardware.detect()
    assert (found.device, found.lane, found.dtype) == ("cpu", lane, dtype)
    assert f"bf16 {rates['bf16']:.0f} GFLOP/s" in found.why
    assert hardware.detect("int8", lane="bf16").lane == "bf16", "--lane overrides it"
    assert hardware.detect("fp32").dtype == torch.float32 and hardware.detect("fp32").lane == lane
    assert default_model(found) == ("smollm2-135m", "no CUDA device")


def test_several_processes_take_the_lane_of_the_first(monkeypatch):
    qlora_finetune.import_libraries()
    monkeypatch.setattr(hardware.lanes, "trial", lambda width, between: {"fp32": 100.0, "bf16": 90.0})
    monkeypatch.setattr(hardware, "told_by_first", lambda own: ("bf16", torch.bfloat16))
    settings, machine = qlora_finetune.choose_model(TrainSettings(device="cpu"))
    assert (settings.lane, machine.lane, machine.dtype) == ("bf16", "bf16", torch.bfloat16)


def test_the_trial_times_every_lane():
    found = hardware.lanes.trial(64, 96)
    assert found.keys() == hardware.lanes.DTYPES.keys() and min(found.values()) > 0


@pytest.mark.parametrize("lane", ["libraries", "bf16"])
def test_processes_on_a_cpu_compute_as_the_first_one_does(monkeypatch, lane):
    # --lane libraries: the trial of one process said fp32, that of another bf16, and gloo stopped the run
    mine = hardware.detect("nf4", "cpu", "fp32")
    monkeypatch.setattr(hardware, "told_by_first", lambda _: (lane, torch.bfloat16))
    agreed = hardware.like_the_first(mine)
    assert (agreed.lane, agreed.dtype) == (lane, torch.bfloat16)
    monkeypatch.setattr(hardware, "told_by_first", lambda own: own)
    assert hardware.like_the_first(mine) is mine
