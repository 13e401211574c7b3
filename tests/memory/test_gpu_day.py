"""The list for the day a GPU is there: rehearsed on a CPU, resumable, kept step by step."""

import json
import subprocess
import sys

from conftest import ROOT


def day(out, *flags) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "benchmarks/gpu_day.py", "--rehearse", "--out", out, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def test_steps_are_kept_and_not_begun_where_the_budget_ends(tmp_path):
    done = day(tmp_path, "--steps", "plain")
    assert done.returncode == 0, done.stderr + done.stdout
    record = json.loads((tmp_path / "gpu_rehearsal.json").read_text())
    assert set(record["steps"]) == {"plain"} and record["environment"]["device"] == "cpu"
    assert all(
        row["tokens_per_second"] > 0 and row["loss_is_finite"] for row in record["steps"]["plain"]["result"]
    )
    done = day(tmp_path, "--budget", 0)
    assert "plain      done before" in done.stdout and "run        not begun: it may take" in done.stdout
    assert json.loads((tmp_path / "gpu_rehearsal.json").read_text()) == record


def test_without_a_gpu_it_says_what_is_missing():
    command = [sys.executable, ROOT / "benchmarks/gpu_day.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "--rehearse" in done.stderr
