"""Runs with --packing: every token is read once, and a stopped run resumes to the same bytes."""

import json
import shutil

import pytest
from conftest import here, script

from qlora.files import SEAL

WEIGHTS = "adapter_model.safetensors"
FLAGS = (
    *("--objective", "lm", "--packing", "--samples", 24, "--eval-samples", 4, "--max-length", 96),
    *("--batch-size", 2, "--save-steps", 4, "--epochs", 2, "--lane", "fp32", "--learning-rate", 0.005),
)


@pytest.fixture(scope="module")
def reviews_file(tmp_path_factory, reviews):
    """Short and long texts, which are cut at --max-length."""
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"text": " ".join(row.text.split()[: 4 + 5 * i])} for i, row in enumerate(reviews)]
    rows += [{"text": f"A short one, number {i}."} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder, reviews_file):
    """A complete run of two epochs."""
    out = tmp_path_factory.mktemp("packing") / "run"
    flags = ("--model", tiny_folder, "--dataset", reviews_file, "--output-dir", out, *FLAGS)
    # In a process of its own: the memory of all tensors that are there is measured.
    done = script("qlora_finetune.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "packing    24 rows in " in done.stderr and "own decoder" in done.stderr
    return out


def test_every_token_of_an_epoch_is_read_once(run):
    report = json.loads((run / "report.json").read_text())
    assert report["data"]["train_rows"] == 24 and report["settings"]["packing"]
    assert report["train"]["real_tokens"] == 2 * report["data"]["train_tokens"]
    # Twelve steps of two rows an epoch without packing.
    assert report["train"]["steps"] < 2 * 12 and report["train"]["loss_last"] < report["train"]["loss_first"]
    memory = report["memory"]
    assert memory["measured_peak_bytes"] < 1.05 * memory["predicted_peak_bytes"]


def test_a_stopped_run_resumes_to_the_same_bytes(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "run")
    saved = sorted(again.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    shutil.rmtree(saved[-1])
    for name in ("report.json", WEIGHTS, SEAL):
        (again / name).unlink()
    done = here("qlora_finetune.py", "--output-dir", again, "--resume")
    assert done.returncode == 0 and f"resuming from {saved[-2]}" in done.stderr, done.stderr
    assert (again / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
    (again / "report.json").unlink()
    done = here("qlora_finetune.py", "--output-dir", again, "--resume", "--no-packing")
    assert done.returncode == 2 and "--packing True -> False" in done.stderr, done.stderr
