"""The checkpoints of a run's folder: which one to go on from, and which ones to keep."""

from pathlib import Path

from transformers import TrainerState

from config import KEEP_CHECKPOINTS
from qlora.cli import note
from qlora.files import broken_files, discard
from qlora.training.watching import best_step, damage_of

MEASURED = "measured.json"  # what training took so far


def checkpoints(out: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    numbered = [p for p in out.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(numbered, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_complete(out: Path, with_best: bool = False) -> Path | None:
    """Newest checkpoint that is whole by its complete.json; the others are named and skipped.

    `with_best`: whose best step's checkpoint is whole, too; without that the run could not end as it should.
    """
    for folder in checkpoints(out):
        if broken_files(folder) != [] or not (folder / MEASURED).exists():
            note(f"{folder} is incomplete, damaged or of an older version: skipped")
        elif with_best and (damage := damage_of_best(folder)):
            note(f"{folder} is skipped: held-out loss was lower at another step, and {damage}")
        else:
            return folder
    return None


def damage_of_best(checkpoint: Path) -> str:
    """Why the best one so far, by what this checkpoint knows, can't be used; "" if it can."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    best = best_step(state.log_history)
    return damage_of(checkpoint.with_name(f"checkpoint-{best}")) if best else ""


def discard_old(out: Path, step: int, history: list[dict] | None) -> None:
    """Keep the newest checkpoints up to `step` and, by a log_history if given, the best one of each.

    Of each, because a newest that turns out damaged is passed over. Those of later steps were skipped when
    the run began: damaged, or of an older version.
    """
    kept = [folder for folder in checkpoints(out) if step_of(folder) <= step][:KEEP_CHECKPOINTS]
    if history is not None:
        kept += [out / f"checkpoint-{best_step(history, step_of(folder))}" for folder in kept]
    for old in set(checkpoints(out)) - set(kept):
        discard(old)
