"""A few held-out rows scored while a run trains: its curve, its best step, and when to stop (--eval-steps).

Which step was best is read from the Trainer's log_history alone. That is in every checkpoint, so a resumed
run decides as the uninterrupted one; and the best checkpoint is named by its step, wherever the folder has
been moved since. (transformers' best_model_checkpoint is a path, its EarlyStoppingCallback counts by itself.)
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from config import WATCHED_ROWS
from qlora import processes
from qlora.files import broken_files
from qlora.training.before_after import BeforeAfter

Scorer = Callable[[torch.nn.Module], dict]  # model -> {"loss": …, perhaps "accuracy": …}


class HeldOut:
    """Scores `rows` held-out rows by `score`; after `patience` of them without a better one it stops."""

    def __init__(self, score: Scorer, rows: int, patience: int | None):
        self.score, self.rows, self.patience = score, rows, patience

    def measure(self, model) -> dict:
        """{"eval_loss", perhaps "eval_accuracy"}, the same in all processes.

        Leaves the model in its mode and the random state as it was: training goes on as if nobody had looked.
        """
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            found = self.score(model)
        model.train(was_training)
        return processes.told_by_first({f"eval_{name}": value for name, value in found.items()})

    @property
    def keeps_best(self) -> bool:
        """Whether the best step's adapter is the one that is saved: --early-stopping asks for it."""
        return self.patience is not None

    @property
    def chooses_on(self) -> int:
        """How many rows choose the step that is saved; 0: none do."""
        return self.rows if self.keeps_best else 0

    def is_over(self, history: list[dict]) -> bool:
        """Whether the last `patience` scorings of a log_history were no better than one before them."""
        if not self.keeps_best:
            return False
        best, steps = best_step(history), [point["step"] for point in points(history)]
        return sum(step > (best or 0) for step in steps) >= self.patience


def of_run(settings, comparison: BeforeAfter) -> HeldOut | None:
    """The first held-out rows, as --eval-steps and --early-stopping ask for them; None if they do not."""
    if settings.eval_steps is None:
        return None
    rows = min(WATCHED_ROWS, comparison.scored)
    return HeldOut(comparison.scorer(rows), rows, settings.early_stopping)


def points(history: list[dict]) -> list[dict]:
    """[{"step", "loss", "accuracy"}] of a log_history's scorings."""
    scored = [logged for logged in history if "eval_loss" in logged]
    names = {"step": "step", "loss": "eval_loss", "accuracy": "eval_accuracy"}
    return [{ours: each[theirs] for ours, theirs in names.items() if theirs in each} for each in scored]


def best_step(history: list[dict], until: float = math.inf) -> int | None:
    """The step with the lowest held-out loss, the first of equal ones; None if there is no finite loss."""
    scored = [x for x in points(history) if x["step"] <= until and math.isfinite(x["loss"])]
    return min(scored, key=lambda point: point["loss"])["step"] if scored else None


def damage_of(checkpoint: Path) -> str:
    """Why a checkpoint can't be used, in words; "" if it can."""
    if not checkpoint.is_dir():
        return f"{checkpoint} is missing"
    broken = broken_files(checkpoint)
    return "" if broken == [] else f"{checkpoint} is damaged ({(broken or ['complete.json'])[0]})"


def section(held_out: HeldOut | None, state, every: int, seconds: float) -> dict | None:
    """The report's `during_training`, by the Trainer's state at its end; `seconds`: what scoring took."""
    if held_out is None:
        return None
    history, last = state.log_history, state.global_step
    best = best_step(history)
    return {
        "rows": held_out.rows,
        "every": every,
        "points": points(history),
        "best_step": best,
        "last_step": last,
        "saved_step": best if held_out.keeps_best and best else last,
        "stopped_early": last < state.max_steps and held_out.is_over(history),
        "seconds": seconds,
    }
