"""Bytes of live tensors, counted on tensors small enough to add up by hand."""

from __future__ import annotations

import torch

from qlora import hardware
from qlora.live_bytes import LiveBytes, StepPeak


def test_a_storage_counts_once_from_its_birth_to_its_death():
    live = LiveBytes()
    with live:
        live.tag = "kept"
        a = torch.zeros(1000)  # 4000 bytes
        view = a[:10].view(2, 5)  # no storage of its own
        live.tag = "passing"
        b = torch.ones(500)  # 2000 bytes
        del b
        live.tag = "late"
        c = a + 1  # 4000 bytes
    assert (live.now, live.peak) == (8000, 8000)
    assert {k: v for k, v in live.live.items() if v} == {"kept": 4000, "late": 4000}
    del a
    assert live.now == 8000, "the view still holds it"
    del view, c
    assert live.now == 0


def test_what_autograd_keeps_is_alive_and_cuda_blocks_are_rounded():
    live = LiveBytes(block=512)
    x = torch.randn(100, requires_grad=True)
    with live:
        y = x.exp()  # 400 bytes -> 512; the graph keeps it for the backward pass
        z = y.sum()  # 4 bytes -> 512
        del y
    assert live.now == 1024
    del z
    assert live.now == 0


def step(peak: StepPeak, width: int, steady: bool = True, megabytes: int = 1) -> int:
    """Watch a step that holds this much at once; returns the peak so far, less what existed before."""
    before = LiveBytes()
    before.count_existing()
    with peak.watch(width, steady):
        torch.zeros(megabytes * 250_000)
    return peak.bytes - before.now


def test_the_peak_of_a_step_is_what_existed_and_what_it_adds():
    peak = StepPeak("cpu")
    held = torch.zeros(1000)
    assert step(peak, width=16) == 1_000_000
    assert peak.bytes >= held.nbytes + 1_000_000


def test_on_a_cpu_only_steps_that_are_wider_than_before_are_counted():
    peak = StepPeak("cpu")
    assert step(peak, width=32) == 1_000_000
    first = peak.bytes
    step(peak, width=32, megabytes=5)
    step(peak, width=16, megabytes=5)
    assert peak.bytes == first
    assert step(peak, width=48, megabytes=5) == 5_000_000
    step(peak, width=64, megabytes=1)
    assert peak.bytes > first + 3_900_000, "a wider step that holds less lowers nothing"


def test_after_the_first_step_the_next_is_counted_too():
    # The first has no optimizer state yet: without a second look its peak would miss the state.
    peak = StepPeak("cpu")
    step(peak, width=32, steady=False)
    assert step(peak, width=16, megabytes=3) == 3_000_000
    counted = peak.bytes
    step(peak, width=16, megabytes=9)
    assert peak.bytes == counted


def test_what_was_measured_before_a_resumed_run_counts():
    peak = StepPeak("cpu")
    peak.bytes = 1 << 40
    step(peak, width=32)
    assert peak.bytes == 1 << 40


def test_on_a_gpu_the_allocator_counts_from_the_first_step_on(monkeypatch):
    allocated, resets = iter([500, 70, 90, 80, 80]), []  # 500: loading and scoring
    monkeypatch.setattr(hardware, "_earlier_peak", 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(allocated))
    peak = StepPeak("cuda")
    seen = []
    for width in (32, 16, 48):
        with peak.watch(width, steady=True):
            assert resets == ["reset"], "what was loaded and scored before is no step's"
        seen.append(peak.bytes)
    assert seen == [70, 90, 90]
    assert hardware.peak_memory_bytes("cuda") == 500  # the process's own was once forgotten
