"""Several processes (torchrun over gloo) train as one: the same rows in every update, the same adapter.

Bound: the processes add the same fp32 gradients in another order. That changes a gradient by about its last
bit (1e-7 of it), and AdamW moves a weight by at most the learning rate a step whatever the gradient's size.
So after 8 steps at 5e-4 weights may differ by 8 x 5e-4 x 1e-3 at most, unless a gradient is all rounding.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from safetensors.torch import load_file

from qlora import processes
from qlora.batches import LengthBatches
from qlora.cli import UsageError

BOUND = 8 * 5e-4 * 1e-3
MEETING = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node")
# 30 rows in batches of 4: two rows of the last one are blank, one process's share.
SMALL = ("--samples", 30, "--eval-samples", 7, "--max-length", 96, "--precision", "fp32", "--save-steps", 3)
SMALL += ("--lane", "fp32", "--eval-steps", 3, "--early-stopping", 9)


def start(count: int, *flags, job: Path = ROOT / "qlora_finetune.py") -> subprocess.Popen:
    port = 20000 + os.getpid() % 20000
    launch = [*TORCHRUN, count, "--master_port", port] if count > 1 else [sys.executable]
    command = [*map(str, launch), str(job), *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, env=env, cwd=ROOT, **pipes)


def finish(running: subprocess.Popen) -> tuple[int, str, str]:
    out, err = running.communicate(timeout=280)
    return running.returncode, out, err


@pytest.fixture(scope="module")
def alone(tiny_folder, tmp_path_factory) -> Path:
    """One process, batches of 4."""
    out = tmp_path_factory.mktemp("alone") / "run"
    code, _, err = finish(start(1, "--model", tiny_folder, "--output-dir", out, "--batch-size", 4, *SMALL))
    assert code == 0, err
    return out


def difference(one: Path, other: Path) -> float:
    a, b = (load_file(run / "adapter_model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def report(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def test_two_processes_train_the_adapter_of_one(alone, tiny_folder, tmp_path):
    out = tmp_path / "run"
    code, printed, err = finish(
        start(2, "--model", tiny_folder, "--output-dir", out, "--batch-size", 2, *SMALL)
    )
    assert code == 0, err
    assert difference(alone, out) <= BOUND
    one, two = report(alone), report(out)
    assert two["train"]["real_tokens"] == one["train"]["real_tokens"]  # blank rows are no work
    assert (one["train"]["world_size"], two["train"]["world_size"]) == (1, 2)
    for key in ("base_zero_shot", "base_few_shot", "bag_of_words", "tuned"):
        assert two["evaluation"][key] == one["evaluation"][key]
    # They agree on every scoring, so on the best step, too; its sums are of the weights that BOUND is for.
    seen, there = two["during_training"], one["during_training"]
    assert [(p["step"], p["accuracy"]) for p in seen["points"]] == [
        (p["step"], p["accuracy"]) for p in there["points"]
    ]
    losses = ([point["loss"] for point in each["points"]] for each in (seen, there))
    assert next(losses) == pytest.approx(next(losses), abs=1e-4) and seen["rows"] == 7
    assert seen["saved_step"] == there["saved_step"]
    assert printed.count("the same 7 held-out rows") == 1  # the first process prints, the other does not
    assert err.count("device ") == 1 and err.count("guards     all") == 1
    assert (out / "checkpoint-8" / "rng_state_1.pth").exists()
    assert not list(out.glob(".qlora-part-*"))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_run_that_lost_a_process_is_resumed(victim, alone, tiny_folder, tmp_path):
    out = tmp_path / "run"
    flags = ("--model", tiny_folder, "--output-dir", out, "--batch-size", 2, *SMALL)
    running = start(2, *flags)
    deadline = time.monotonic() + 200
    while not (out / "checkpoint-3").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(worker(running.pid, victim), signal.SIGKILL)
    code, _, err = finish(running)
    assert code != 0 and not (out / "report.json").exists(), err
    code, _, err = finish(start(2, "--output-dir", out, "--resume"))
    assert code == 0, err
    assert "resuming from" in err and report(out)["train"]["processes"] == 2
    assert difference(alone, out) <= BOUND


def worker(launcher: int, rank: int) -> int:
    """Process id of the worker with this rank."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no worker {rank}")


def test_a_run_is_resumed_with_as_many_processes(alone):
    code, _, err = finish(start(2, "--output-dir", alone, "--resume", "--overwrite"))
    assert code != 0 and "choose one of them" in err
    (alone / "report.json").rename(alone / "report.old")
    try:
        code, _, err = finish(start(2, "--output-dir", alone, "--resume"))
    finally:
        (alone / "report.old").rename(alone / "report.json")
    assert code != 0 and err.count("--processes 1 -> 2") == 1, err


def test_a_launcher_that_starts_one_process_for_two_is_refused(tiny_folder, tmp_path):
    # `accelerate launch --cpu --num_processes 2` does; the run would have half the batch that it was told.
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    command = [*launch, "--num_processes", "2", str(ROOT / "qlora_finetune.py"), "--model", str(tiny_folder)]
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode != 0
    assert "accelerate launch was asked for 2 processes and started one" in done.stderr
    assert "torchrun --nproc_per_node 2" in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, fault",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"),
        ({"RANK": "3", "WORLD_SIZE": "2", **MEETING}, "RANK=3 but WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but no RANK, LOCAL_RANK"),
        ({"LOCAL_RANK": "1" * 5000}, "set by no launcher"),
    ],
)
def test_an_odd_environment_is_refused(monkeypatch, given, fault):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=fault):
        processes.read_environment()


def test_a_process_alone_forgets_what_a_launcher_left(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.setenv(name, "0")
    processes.read_environment()
    assert not {"RANK", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"} & set(os.environ)


@pytest.mark.parametrize("rows, count", [(30, 2), (31, 3), (8, 2)])
def test_batches_of_several_processes_hold_the_rows_of_one(rows, count):
    lengths = [10 + 7 * (i * i % 13) for i in range(rows)]
    whole = list(LengthBatches(lengths, 2 * count, seed=1))
    shared = list(LengthBatches(lengths, 2, 1, count))
    assert len(shared) == len(LengthBatches(lengths, 2, 1, count)) == -(-rows // (2 * count)) * 2 * count
    for step in range(0, len(shared), 2 * count):
        batch = [i for i in shared[step : step + 2 * count] if i < rows]
        assert sorted(batch) == sorted(whole[step : step + 2 * count])
