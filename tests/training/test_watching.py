"""Held-out rows scored while a run trains, the best step, trackers, and the table of runs."""

import csv
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import date
from pathlib import Path

import pytest
from conftest import ROOT, SMALL_RUN, here

from config import TrainSettings
from qlora.memory import plan
from qlora.training import checkpoints, run_folder, trackers, trainer, watching
from qlora.training.before_after import BeforeAfter

WEIGHTS = "adapter_model.safetensors"
# Twelve rows, again and again at a high rate: the held-out loss falls, then rises.
OVERFIT = ("--samples", 12, "--eval-samples", 12, "--max-length", 64, "--batch-size", 4, "--epochs", 20)
OVERFIT += ("--learning-rate", 0.02, "--save-steps", 7, "--lane", "fp32", "--eval-steps", 3)
KILL = """
import os, signal
import qlora_finetune
from qlora.training import trainer
count_on = trainer.Watch.on_step_end
def killed(self, args, state, control, **kwargs):
    count_on(self, args, state, control, **kwargs)
    if state.global_step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.Watch.on_step_end = killed
qlora_finetune.main()
"""


def train(out: Path, *flags) -> subprocess.CompletedProcess:
    return here("qlora_finetune.py", "--output-dir", out, *flags)


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def sharp_folder(tiny_folder, tmp_path_factory) -> Path:
    """The tiny model with a head of twenty times the size: it can be sure of a token, so it can overfit."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("models") / "sharp")
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def no_plan():
    """The memory plan of a run is not what is tested here, and takes a third of its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "predict_run", lambda *args, **kwargs: None)
        yield


@pytest.fixture(scope="module")
def overfit(sharp_folder, reviews, tmp_path_factory) -> list:
    """The flags of a run that overfits, on a file of 24 reviews."""
    rows = tmp_path_factory.mktemp("rows") / "reviews.csv"
    with open(rows, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *((row.text, row.label) for row in reviews)])
    return ["--model", sharp_folder, "--dataset", rows, *OVERFIT, "--early-stopping", 2]


@pytest.fixture(scope="module")
def stopped(overfit, tmp_path_factory) -> Path:
    """A run that overfits, stopped two scorings after its best one."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    done = train(out, *overfit)
    assert done.returncode == 0, done.stderr
    return out


def test_the_best_step_of_a_run_that_overfits_is_saved(stopped):
    during = report(stopped)["during_training"]
    losses = {point["step"]: point["loss"] for point in during["points"]}
    best = min(losses, key=losses.get)
    assert during["best_step"] == during["saved_step"] == best
    assert during["stopped_early"] and during["last_step"] == best + 2 * 3 < 60
    assert losses[during["last_step"]] > losses[best] < losses[3]
    assert weights(stopped) == weights(stopped / f"checkpoint-{best}")
    assert weights(stopped) != weights(stopped / f"checkpoint-{during['last_step']}")
    text = (stopped / "report.md").read_text()
    assert f"lowest at step {best} of {best + 6}" in text and f"what is saved is step {best}" in text
    assert report(stopped)["train"]["steps"] == best + 6  # of the loss curve, the overfitted end as well


def test_rows_that_chose_the_step_are_told_from_the_others(stopped):
    # 12 held-out rows, all of them scored between steps: no others are left
    assert "tuned_on_others" not in report(stopped)["evaluation"]
    comparison = object.__new__(BeforeAfter)
    comparison.truth = [0, 1, 0, 1]
    comparison.prompt = type("Prompt", (), {"answers": ("no", "yes")})
    found = comparison._tuned([0, 1, 1, 1], chosen_on=2)
    assert found["tuned"]["accuracy"] == 0.75
    assert found["tuned_on_others"]["accuracy"] == 0.5 and found["tuned_on_others"]["rows"] == 2


def killed_at(step: int, out: Path, *flags) -> None:
    """A run in a process of its own, killed by SIGKILL after this step, before it is scored or saved."""
    command = [sys.executable, "-c", KILL.format(step=step), "--output-dir", str(out), *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def interrupted_at(step: int, out: Path, *flags) -> None:
    """A run in this process that ends with an error after this step, with nothing saved of it."""
    count_on = trainer.Watch.on_step_end

    def stop(self, args, state, control, **kwargs):
        count_on(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt("stopped by the test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Watch, "on_step_end", stop)
        done = train(out, *flags)
    assert done.returncode == 130 and not (out / "report.json").exists(), done.stderr


def test_a_run_killed_after_its_best_step_ends_with_the_same_adapter(stopped, overfit, tmp_path):
    killed_at(report(stopped)["during_training"]["last_step"] - 1, tmp_path / "run", *overfit)
    assert not (tmp_path / "run" / "report.json").exists()
    run = shutil.move(tmp_path / "run", tmp_path / "moved")  # the best checkpoint is found there, too
    done = train(run, "--resume")
    assert done.returncode == 0 and "resuming from" in done.stderr, done.stderr
    assert weights(run) == weights(stopped)
    again, first = report(run)["during_training"], report(stopped)["during_training"]
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


@pytest.mark.parametrize("moment", ["best saved", "stopped", "stopped, then the best damaged"])
def test_other_moments_to_be_killed(stopped, tmp_path, moment):
    best, last = (report(stopped)["during_training"][key] for key in ("best_step", "last_step"))
    out = shutil.copytree(stopped, tmp_path / "run")
    for lost in ("report.json", WEIGHTS):
        (out / lost).unlink()
    if moment == "best saved":
        for later in [c for c in checkpoints.checkpoints(out) if checkpoints.step_of(c) > best]:
            shutil.rmtree(later)
    elif moment != "stopped":
        with open(out / f"checkpoint-{best}" / WEIGHTS, "r+b") as file:
            file.truncate(100)
    done = train(out, "--resume")
    assert done.returncode == 0 and weights(out) == weights(stopped), done.stderr
    assert (
        report(out)["during_training"]["last_step"] == last and not (out / f"checkpoint-{last + 1}").exists()
    )
    if "damaged" in moment:  # later checkpoints are of no use then: the run begins again
        why = f"held-out loss was lower at another step, and {out}/checkpoint-{best} is damaged ({WEIGHTS})"
        assert why in done.stderr and "resuming from" not in done.stderr


def test_ctrl_c_keeps_the_best_checkpoint(stopped, overfit, tmp_path, monkeypatch):
    during = report(stopped)["during_training"]
    best, asked = during["best_step"], during["last_step"] - 1
    count_on = trainer.Watch.on_step_end

    def ask(self, args, state, control, **kwargs):
        self.interrupt.asked = state.global_step == asked
        count_on(self, args, state, control, **kwargs)

    monkeypatch.setattr(trainer.Watch, "on_step_end", ask)
    # A checkpoint of every step, which push older ones out.
    done = train(tmp_path / "run", *overfit, "--save-steps", 1)
    assert done.returncode == 130 and f"saved at step {asked}" in done.stderr, done.stderr
    steps = [checkpoints.step_of(checkpoint) for checkpoint in checkpoints.checkpoints(tmp_path / "run")]
    assert steps == [asked, asked - 1, best]


def test_a_best_checkpoint_that_is_lost_at_the_end_is_one_clear_line(overfit, tmp_path, monkeypatch):
    go_back = trainer.QLoRATrainer._go_back_to_best

    def lost(self):
        shutil.rmtree(self.run.out / f"checkpoint-{watching.best_step(self.state.log_history)}")
        go_back(self)

    monkeypatch.setattr(trainer.QLoRATrainer, "_go_back_to_best", lost)
    done = train(tmp_path / "run", *overfit)
    assert done.returncode == 1 and not (tmp_path / "run" / WEIGHTS).exists()
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "held-out loss was lowest at step" in line and " is missing; " in line and "--resume" in line


def test_scoring_changes_nothing_of_training_and_is_not_its_time(trained, tiny_folder, tmp_path, monkeypatch):
    # bitsandbytes' repacked weights, the random state and the model's mode are what it could change.
    import time

    slow, measure, clock, later = 1000, watching.HeldOut.measure, time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + slow * len(later))  # no real second counts
    monkeypatch.setattr(watching.HeldOut, "measure", lambda *args: later.append(1) or measure(*args))
    flags = ("--model", tiny_folder, *SMALL_RUN, "--learning-rate", "0.005")
    assert train(tmp_path / "run", *flags, "--eval-steps", 1).returncode == 0
    assert weights(tmp_path / "run") == weights(trained)
    watched = report(tmp_path / "run")
    assert [point["step"] for point in watched["during_training"]["points"]] == [1, 2, 3, 4]
    assert watched["during_training"]["seconds"] > 4 * slow
    assert watched["train"]["seconds"] < slow < 4 * slow < watched["seconds"]
    assert watched["during_training"]["saved_step"] == 4 and not watched["during_training"]["stopped_early"]


def test_with_dropout_the_random_state_is_as_if_nobody_had_looked(tiny_folder, tmp_path, monkeypatch):
    # Planted: a scorer that draws. The layers are the libraries', with bitsandbytes' own products.
    import torch

    of_run = watching.of_run

    def draws(settings, comparison):
        held_out = of_run(settings, comparison)
        if held_out:
            score = held_out.score
            held_out.score = lambda model: [torch.rand(3), score(model)][1]
        return held_out

    monkeypatch.setattr(watching, "of_run", draws)
    flags = ("--model", tiny_folder, *SMALL_RUN, "--learning-rate", "0.005", "--lora-dropout", "0.1")
    for name, more in (("plain", ()), ("watched", ("--eval-steps", 1))):
        assert train(tmp_path / name, *flags, *more).returncode == 0
    assert weights(tmp_path / "plain") == weights(tmp_path / "watched")


@pytest.fixture
def no_network(monkeypatch):
    """[addresses that something tried to reach]"""
    tried, connect = [], socket.socket.connect

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            tried.append(address)
            raise OSError("no network in this test")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tried


def events(folder: Path) -> dict:
    """{tag: [(step, value)]} of what TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def logged(out: Path) -> list[dict]:
    """What trackio's database holds, in order."""
    with closing(sqlite3.connect(next((out / "trackio").glob("*.db")))) as database:
        found = database.execute("select run_name, metrics from metrics order by id").fetchall()
    return [{"run": run, **json.loads(metrics)} for run, metrics in found]


def test_trackers_are_read_back_also_after_a_resume(tiny_folder, tmp_path, monkeypatch, no_network):
    for name in ("TRACKIO_DIR", "TENSORBOARD_LOGGING_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    out = tmp_path / "run"
    flags = ("--model", tiny_folder, *SMALL_RUN, "--eval-steps", 2, "--run-name", "mine")
    # Step 3 is logged, but in no checkpoint.
    interrupted_at(4, out, *flags, "--report-to", "tensorboard", "trackio")
    done = train(out, "--resume")
    assert done.returncode == 0 and done.stdout.startswith("the same 8 held-out rows"), done.stdout
    history = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = {each["step"]: each["loss"] for each in history if "loss" in each}
    held_out = {each["step"]: each["eval_loss"] for each in history if "eval_loss" in each}

    found = events(out / "tensorboard")
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]  # step 3, logged twice, is shown once
    assert dict(found["train/loss"]) == pytest.approx(losses)
    assert dict(found["eval/loss"]) == pytest.approx(held_out) and len(found["eval/accuracy"]) == 2

    rows = [row for row in logged(out) if "train/loss" in row]
    assert {row["run"] for row in rows} == {"mine"}
    assert [row["train/global_step"] for row in rows] == [1, 2, 3, 3, 4]  # trackio shows both
    assert rows[-1]["train/loss"] == pytest.approx(losses[4])
    assert no_network == []
    assert (
        report(out)["name"] == "mine"
        and json.loads((out / "settings.json").read_text())["run_name"] == "mine"
    )
    run_folder.Run(TrainSettings(output_dir=out, overwrite=True))._begin(
        TrainSettings(output_dir=out), "float32"
    )
    assert not (out / "tensorboard").exists() and not (out / "trackio").exists()


@pytest.mark.parametrize(
    "flags, fault",
    [
        (("--early-stopping", 3), "--early-stopping 3 counts scorings: add --eval-steps"),
        (("--report-to", "wandb"), "the package is not installed; pip install wandb"),
        (("--report-to", "trackio"), "the package is not installed; pip install -r requirements-track.txt"),
        (("--report-to", "mlflow"), "--report-to"),
        (("--eval-steps", 0), "--eval-steps 0: must be from 1"),
        (("--run-name", " "), "--run-name is empty"),
    ],
)
def test_flags_that_can_not_work_are_told_before_anything_heavy(tmp_path, monkeypatch, flags, fault):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    done = train(tmp_path / "run", "--model", tmp_path / "no-such-model", *flags)
    assert done.returncode == 2 and fault in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_login_is_told_how_to_stay_offline(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    done = train(tmp_path / "run", "--report-to", "wandb")
    assert done.returncode == 2 and "`wandb login`, or set WANDB_MODE=offline" in done.stderr
    assert not trackers.wandb_is_ready()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert trackers.wandb_is_ready()
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert trackers.wandb_is_ready()


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"model": "smollm2-135m", "learning_rate": 5e-4}, "smollm2-135m-r16-lr5e-4"),
        ({"model": "you/Tiny Model.v2", "learning_rate": 2.5e-5, "lora_r": 8}, "tiny-model.v2-r8-lr2.5e-5"),
        ({"model": "/models/x/", "learning_rate": 0.1}, "x-r16-lr1e-1"),
        ({"model": "models/Some.Q4_0.gguf", "learning_rate": 0.001}, "some.q4_0-r16-lr1e-3"),
    ],
)
def test_a_runs_name_is_its_date_and_settings(settings, name):
    whole = trackers.default_name(TrainSettings(**settings))
    assert whole[10:] == f"-{name}" and date.fromisoformat(whole[:10])


def test_a_name_and_trackers_may_change_on_resume(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    given = report(run)["name"]
    (run / "report.json").unlink()
    assert train(run, "--resume").returncode == 0 and report(run)["name"] == given
    done = train(run, "--resume", "--run-name", "another", "--report-to", "none")
    assert done.returncode == 0 and "nothing to do" in done.stderr, done.stderr
    done = train(run, "--resume", "--eval-steps", 2)
    assert done.returncode == 2 and "--eval-steps None -> 2" in done.stderr


@pytest.mark.parametrize(
    "losses, patience, over",
    [
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 2.0], 2, True),  # as good is no better
        ([3.0, 2.0, 2.5, 1.9], 2, False),
        ([float("nan"), 2.0, float("inf")], 1, True),
        ([float("nan"), float("nan")], 2, True),
        ([3.0, 2.0, 2.5, 2.5, 2.5], None, False),
    ],
)
def test_when_a_run_is_over(losses, patience, over):
    history = [{"step": 1, "loss": 9.0}]
    history += [{"step": 10 * i, "eval_loss": loss} for i, loss in enumerate(losses, 1)]
    assert watching.HeldOut(None, 8, patience).is_over(history) == over


def test_the_best_step_is_the_first_of_equal_ones_up_to_a_step():
    history = [{"step": step, "eval_loss": loss} for step, loss in ((2, 1.0), (4, 0.5), (6, 0.5), (8, 0.1))]
    assert watching.best_step(history) == 8 and watching.best_step(history, until=7) == 4
    assert watching.best_step([{"step": 3, "loss": 1.0}]) is None


def test_the_table_of_runs_names_each_and_what_is_damaged(trained, stopped, tmp_path):
    for number, run in enumerate((trained, stopped)):
        (tmp_path / f"run{number}").mkdir()
        shutil.copy(run / "report.json", tmp_path / f"run{number}")
    (tmp_path / "run1" / "report.json").write_text(
        json.dumps(report(trained) | {"finished": "2001-02-03T04:05:06+00:00", "seconds": 90})
    )
    texts = report(trained) | {
        "evaluation": {"perplexity": {"before": {"perplexity": 40}, "after": {"perplexity": 20.126}}}
    }
    for name, text in (("half", '{"settings"'), ("other", '{"settings": {}}'), ("texts", json.dumps(texts))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(text)
    (tmp_path / "no-run").mkdir()
    told = "import sys, qlora_inference as q; q.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", told, "--runs", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TZ": "UTC"},
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    tuned = report(trained)["evaluation"]["tuned"]
    assert list(lines)[0] == "run1" and "2001-02-03 04:05" in lines["run1"] and lines["run1"].endswith(" 1.5")
    assert f"-> {100 * tuned['accuracy']:.1f}% ({100 * tuned['low']:.1f} to" in lines["run0"]
    assert "perplexity 40.00 -> 20.13" in lines["texts"]
    assert "damaged: not a JSON object" in lines["half"] and "damaged, or of another" in lines["other"]
    assert "no-run" not in lines
    empty = here("qlora_inference.py", "--runs", tmp_path / "no-run")
    assert empty.returncode == 2 and "no folder there holds a report.json" in empty.stderr
    both = here("qlora_inference.py", "--runs", tmp_path, "--evaluate")
    assert both.returncode == 2 and "one thing at a time" in both.stderr
