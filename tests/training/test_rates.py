"""--find-lr: five rates from the same start; it writes nothing and chooses nothing."""

import json
import math

import pytest
from conftest import SMALL_RUN, here

from qlora import processes
from qlora.training import rates
from qlora.training.trainer import QLoRATrainer

SCRIPT = "qlora_finetune.py"


def test_rates_are_a_tenth_to_ten_times():
    assert rates.rates_around(5e-4) == [5e-5, 1.6e-4, 5e-4, 1.6e-3, 5e-3]
    assert rates.rates_around(0.2) == [0.02, 0.063, 0.2, 0.63]


def test_each_rate_trains_what_a_run_at_it_trains(trained, tiny_folder, tmp_path, monkeypatch):
    step = QLoRATrainer.training_step

    def ruined_at_a_lower_rate(self, model, *given):
        loss = step(self, model, *given)
        if self.args.learning_rate == 0.0016:  # before the rate that is compared: nothing of it may stay
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(QLoRATrainer, "training_step", ruined_at_a_lower_rate)
    out = tmp_path / "never"
    done = here(
        SCRIPT, "--model", tiny_folder, "--output-dir", out, *SMALL_RUN, "--learning-rate", 0.005, "--find-lr"
    )
    assert done.returncode == 0, done.stderr
    what, header, *rows = done.stdout.splitlines()
    assert what == "16 training rows from the same start at each rate, 8 held-out rows"
    cells = {float(row.split()[0]): row.split()[1:] for row in rows}
    assert list(cells) == [0.0005, 0.0016, 0.005, 0.016, 0.05]
    assert cells[0.0016][1:5] == ["not", "finite", "-", "-"] and "is nan at step" in done.stderr
    report = json.loads((trained / "report.json").read_text())
    losses = [f"{report['train'][key]:.3f}" for key in ("loss_first", "loss_last")]
    accuracy, low, high = (
        f"{100 * report['evaluation']['tuned'][key]:.1f}%" for key in ("accuracy", "low", "high")
    )
    assert cells[0.005][:-1] == [*losses, accuracy, low, "to", high]
    assert cells[0.05][1] != cells[0.0005][1]
    assert not out.exists()


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_there_is_no_folder_to_resume_or_overwrite(flag, tmp_path):
    done = here(SCRIPT, "--find-lr", flag, "--output-dir", tmp_path / "never")
    assert done.returncode == 2 and "--find-lr writes nothing" in done.stderr


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    done = here(SCRIPT, "--find-lr")
    assert done.returncode == 2 and "in one process" in done.stderr
