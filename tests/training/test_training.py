"""Checkpoints that are complete or absent, resuming after kill -9, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, SMALL_RUN, here, script

from qlora.cpu import lanes
from qlora.files import SEAL
from qlora.training import checkpoints as c
from qlora.training import trainer as t

WEIGHTS = "adapter_model.safetensors"


def start(out, tiny_folder, *flags):
    command = [
        sys.executable,
        str(ROOT / "qlora_finetune.py"),
        "--model",
        str(tiny_folder),
        "--output-dir",
        str(out),
        *map(str, flags),
    ]
    hears = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=hears
    )


def wait_for(path, process, seconds=120):
    end = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < end, process.communicate()[1]
        time.sleep(0.02)


LONG_RUN = (
    "--samples",
    "120",
    "--eval-samples",
    "4",
    "--max-length",
    "64",
    "--batch-size",
    "2",
    "--save-steps",
    "5",
    "--lane",
    "fp32",
)
DROPOUT = ("--lora-dropout", "0.1")  # by the libraries' layers, and the random state counts


def whole_run(folder, model, *flags):
    done = here("qlora_finetune.py", "--model", model, "--output-dir", folder / "run", *LONG_RUN, *flags)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny_folder):
    return whole_run(tmp_path_factory.mktemp("uninterrupted"), tiny_folder)


def test_a_runs_lane_is_kept_and_another_one_is_told(uninterrupted, tmp_path):
    settings = json.loads((uninterrupted / "settings.json").read_text())
    assert settings["lane"] == "fp32" == report(uninterrupted)["settings"]["lane"]
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    (run / "report.json").unlink()
    done = here("qlora_finetune.py", "--output-dir", run, "--resume")
    assert done.returncode == 0 and "--lane fp32 asks for it" in done.stderr, done.stderr
    assert "kernels    fp32 products, own decoder" in done.stderr
    (run / "report.json").unlink()
    done = here("qlora_finetune.py", "--output-dir", run, "--resume", "--lane", "bf16")
    assert done.returncode == 0 and "--lane fp32 -> bf16: from here on" in done.stderr, done.stderr
    assert "kernels    bf16 products, own decoder" in done.stderr
    assert json.loads((run / "settings.json").read_text())["lane"] == "bf16"


def test_a_run_of_the_libraries_is_resumed_in_its_dtype(tiny_folder, tmp_path, monkeypatch):
    # The trial after the interruption may have another winner: the machine was busy then, or is another one.
    out, trial = tmp_path / "run", lambda winner: lambda *_: {"fp32": 1.0, "bf16": 1.0} | {winner: 2.0}
    monkeypatch.setattr(lanes, "trial", trial("bf16"))
    flags = ("--model", tiny_folder, "--output-dir", out, *SMALL_RUN, "--precision", "nf4")
    done = here("qlora_finetune.py", *flags, "--lane", "libraries")
    assert done.returncode == 0 and "dtype      bfloat16: no CUDA device; fp32 1, bf16 2" in done.stderr
    weights = (out / WEIGHTS).read_bytes()
    monkeypatch.setattr(lanes, "trial", trial("fp32"))
    (out / "report.json").unlink()
    shutil.rmtree(max(out.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1])))
    done = here("qlora_finetune.py", "--output-dir", out, "--resume")
    assert done.returncode == 0 and "dtype      bfloat16: as when the run began" in done.stderr, done.stderr
    assert (out / WEIGHTS).read_bytes() == weights


def test_killed_run_resumes_to_the_same_bytes(uninterrupted, tiny_folder, tmp_path):
    # Two kills at different moments.
    out = tmp_path / "run"
    for flags, checkpoint in ((LONG_RUN, "checkpoint-10"), (["--resume"], "checkpoint-30")):
        process = start(out, tiny_folder, *flags)
        wait_for(out / checkpoint, process)
        process.kill()
        process.communicate()
    (out / ".part-killed" / "checkpoint-35").mkdir(parents=True, exist_ok=True)  # as if killed while saving
    done = script("qlora_finetune.py", "--output-dir", out, "--resume")
    assert done.returncode == 0 and "resuming from" in done.stderr, done.stderr
    assert (out / WEIGHTS).read_bytes() == (uninterrupted / WEIGHTS).read_bytes()
    here, there = report(out), report(uninterrupted)
    assert here["evaluation"]["tuned"] == there["evaluation"]["tuned"]
    # The report is of the whole run, not of its last part.
    assert here["train"]["processes"] == 3 and there["train"]["processes"] == 1
    assert here["train"]["real_tokens"] == there["train"]["real_tokens"] == there["data"]["train_tokens"]
    assert [g["name"] for g in here["guards"]].count("all_matrices_learn") == 1
    assert {g["name"] for g in here["guards"]} == {g["name"] for g in there["guards"]}


def report(out) -> dict:
    return json.loads((out / "report.json").read_text())


def test_a_run_killed_after_its_last_step_trains_no_further(tiny_folder, tmp_path):
    # 7 of 60 steps: the Trainer alone would make one more, and the report would be of no step at all
    out = tmp_path / "run"
    flags = ("--model", tiny_folder, "--output-dir", out, *LONG_RUN, "--max-steps", 7)
    assert here("qlora_finetune.py", *flags).returncode == 0
    first, weights = report(out), (out / WEIGHTS).read_bytes()
    for lost in ("report.json", WEIGHTS):
        (out / lost).unlink()
    done = here("qlora_finetune.py", "--output-dir", out, "--resume")
    assert (
        done.returncode == 0
        and (out / WEIGHTS).read_bytes() == weights
        and not (out / "checkpoint-8").exists()
    ), done.stderr
    again = report(out)
    assert all(
        again["train"][k] == first["train"][k] for k in ("steps", "real_tokens", "loss_first", "loss_last")
    )
    assert again["train"]["seconds"] > 0 and again["seconds"] > first["train"]["seconds"]
    assert [g["name"] for g in again["guards"]].count("all_matrices_learn") == 1
    assert again["memory"]["measured_peak_bytes"] == first["memory"]["measured_peak_bytes"]


@pytest.mark.parametrize("moment", ["base, 4 examples", "tuned"])
def test_ctrl_c_while_scoring_says_how_to_resume_too(tiny_folder, tmp_path, moment):
    out = tmp_path / "run"
    process = start(out, tiny_folder, *LONG_RUN, "--eval-samples", 400, "--max-steps", 3)
    seen = ""
    while f"{moment}:" not in seen and process.poll() is None:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--output-dir {out} --resume" in rest and "Traceback" not in rest, (
        seen + rest
    )
    if moment == "tuned":
        return
    # What was scored is not scored again.
    assert len(json.loads((out / "before.json").read_text())["scores"]) == 400
    process, seen = start(out, tiny_folder, "--resume"), ""
    while f"{moment}:" not in seen and process.poll() is None:
        seen += process.stderr.read(1)
    process.kill()
    assert f"{moment}:" in seen and "zero-shot" not in seen, seen


def test_ctrl_c_before_an_earlier_run_is_overwritten_names_no_resume(uninterrupted, tiny_folder, tmp_path):
    # --resume would go on with the earlier run, and its settings
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    process = start(out, tiny_folder, *LONG_RUN, "--overwrite")
    seen = ""
    while "device" not in seen and process.poll() is None:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" not in rest and (out / "report.json").exists(), (
        seen + rest
    )


def test_ctrl_c_saves_and_says_how_to_resume(tiny_folder, tmp_path):
    uninterrupted, out = whole_run(tmp_path / "whole", tiny_folder, *DROPOUT), tmp_path / "run"
    process = start(out, tiny_folder, *LONG_RUN, *DROPOUT)
    wait_for(out / "checkpoint-5", process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (
        process.returncode == 130 and f"--output-dir {out} --resume" in stderr and "Traceback" not in stderr
    )
    assert c.last_complete(out) is not None and not (out / "report.json").exists()
    assert script("qlora_finetune.py", "--output-dir", out, "--resume").returncode == 0
    assert (out / WEIGHTS).read_bytes() == (uninterrupted / WEIGHTS).read_bytes()


def test_an_older_run_on_numbered_labels_is_resumed_with_its_own_question(tiny_folder, tmp_path):
    # runs that began before --question asked the reviews' question of 0 and 1
    rows, out = tmp_path / "rows.csv", tmp_path / "run"
    rows.write_text("text,label\n" + "".join(f"text number {i},{i % 2}\n" for i in range(40)))
    flags = ("--model", tiny_folder, "--output-dir", out, *SMALL_RUN, "--dataset", rows)
    assert here("qlora_finetune.py", *flags).returncode == 0
    assert json.loads((out / "qlora.json").read_text())["prompt"]["answers"] == ["0", "1"]
    settings = json.loads((out / "settings.json").read_text())
    del settings["question"], settings["sha256"]
    (out / "settings.json").write_text(json.dumps(settings))
    for left in ("report.json", "before.json"):
        (out / left).unlink()
    for _ in range(2):  # and the next time, too
        done = here("qlora_finetune.py", "--output-dir", out, "--resume")
        assert done.returncode == 0, done.stderr
        prompt = json.loads((out / "qlora.json").read_text())["prompt"]
        assert prompt["answers"] == ["Negative", "Positive"] and "positive or negative?" in prompt["user"]
        (out / "report.json").unlink()


def test_a_merge_in_progress_is_no_leftover_of_the_run(tmp_path):
    from qlora.files import PART, remove_leftovers, staged

    with staged(tmp_path / "merged") as merging:
        (left := tmp_path / f"{PART}of-a-killed-process").mkdir()
        remove_leftovers(tmp_path)
        assert merging.parent.exists() and not left.exists()
        merging.mkdir()


def test_resume_of_a_complete_run_changes_nothing(uninterrupted):
    def state():
        return {
            p.name: p.stat().st_mtime_ns for p in uninterrupted.iterdir() if p.is_file() and p.name != ".lock"
        }

    before = state()
    done = here("qlora_finetune.py", "--output-dir", uninterrupted, "--resume")
    assert done.returncode == 0 and "nothing to do" in done.stderr
    assert state() == before
    other = here("qlora_finetune.py", "--output-dir", uninterrupted, "--resume", "--epochs", "3")
    assert other.returncode == 2 and "--epochs 1.0 -> 3.0" in other.stderr
    named = script("qlora_finetune.py", "--output-dir", uninterrupted, "--resume", "--target-modules", "lite")
    assert named.returncode == 2 and "--lora-r 16 -> 32" in named.stderr, named.stderr


@pytest.mark.parametrize("harm", ["truncate", "delete optimizer", "no manifest", "older version"])
def test_damaged_checkpoint_is_passed_over(uninterrupted, tmp_path, harm, capsys):
    # transformers#35782: the newest number wins without a check; a missing optimizer is resumed with a fresh
    # one
    out = tmp_path / "copy"
    shutil.copytree(uninterrupted, out)
    newest, older = c.checkpoints(out)
    if harm == "truncate":
        with open(newest / WEIGHTS, "r+b") as file:
            file.truncate(100)
    elif (
        harm == "older version"
    ):  # without the record of what it took, the report would be of the last part only
        manifest = json.loads((newest / SEAL).read_text())
        del manifest[c.MEASURED]
        (newest / SEAL).write_text(json.dumps(manifest))
        (newest / c.MEASURED).unlink()
    else:
        os.unlink(newest / ("optimizer.pt" if harm == "delete optimizer" else SEAL))
    assert c.last_complete(out) == older
    assert "skipped" in capsys.readouterr().err


def test_a_run_that_starts_again_keeps_its_new_checkpoints(uninterrupted, tiny_folder, tmp_path):
    # Passed-over checkpoints have higher numbers: they must not push the new ones out
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    for lost in (out / "report.json", *(folder / SEAL for folder in c.checkpoints(out))):
        lost.unlink()
    process = start(out, tiny_folder, "--resume")
    wait_for(out / "checkpoint-10", process)
    wait_for(out / "checkpoint-15", process)
    process.kill()
    process.communicate()
    assert c.step_of(c.last_complete(out)) in (10, 15, 20, 25)


def test_nan_in_the_base_stops_the_run(tiny_folder, tmp_path):
    # A NaN in the frozen weights: the loader must stop the run, in one line
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bad = tmp_path / "bad"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16)
    model.model.embed_tokens.weight.data[AutoTokenizer.from_pretrained(tiny_folder).encode(" the")[0]] = (
        float("nan")
    )
    model.save_pretrained(bad)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(bad)
    done = here("qlora_finetune.py", "--model", bad, "--output-dir", tmp_path / "run", *SMALL_RUN)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ") and "NaN" in line], (
        done.stderr
    )


def test_nan_during_training_is_seen(tiny_folder, tmp_path, monkeypatch):
    # Trainer's default logs 0 where the loss is NaN (logging_nan_inf_filter): planted in the third step,
    # after all checks
    import qlora_finetune
    from qlora.training.guards import GuardError

    real, calls = t.QLoRATrainer.training_step, []

    def spoiled(self, *args, **kwargs):
        calls.append(1)
        return real(self, *args, **kwargs) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(t.QLoRATrainer, "training_step", spoiled)
    with pytest.raises(GuardError, match="guard 'finite': loss is nan at step 3"):
        qlora_finetune.main(["--model", str(tiny_folder), "--output-dir", str(tmp_path / "run"), *SMALL_RUN])
    assert c.last_complete(tmp_path / "run").name == "checkpoint-2"
