"""The rows of a run: drawn, split, and fit for its objective."""

from config import TrainSettings
from qlora import data
from qlora.cli import UsageError, note, require


def choose_rows(s: TrainSettings, older_run: bool):
    """(training rows, held-out rows, the dataset); UsageError where the objective does not fit the rows."""
    found, name = data.load_rows(s.dataset, s.columns), f"--dataset {' '.join(s.dataset)}"
    if older_run:  # its prompt stays what it was
        found.answers = data.earlier_answers(found)
    kind, lm = found.kind, s.objective == "lm"
    preference, none = s.objective == "preference", "no columns chosen and rejected (and prompt)"
    require(
        kind != "pairs" or preference, f"{name} holds pairs (chosen, rejected): add --objective preference"
    )
    require(kind == "pairs" or not preference, f"--objective preference learns from pairs: {name} has {none}")
    require(kind != "text" or lm, f"{name} has text but no labels: add --objective lm")
    require(kind != "chat" or not lm, f"{name} holds conversations: train on them without --objective lm")
    require(s.question is None or kind == "labels" and not lm, "--question is asked of labelled rows only")
    rows, held_out = data.split(found, s.samples, s.eval_samples, s.seed)
    if kind == "labels" and not lm and len({row.label for row in rows}) < 2:
        labels, lower = len(found.answers), "the others are all held out: lower --eval-samples"
        more = f"{'choose' if s.samples else 'there have to be'} at least {labels}"
        fix = more if len(rows) < labels else lower
        raise UsageError(f"--samples {len(rows)}: the rows drawn have one label only; {fix}")
    different = f"{len(found.rows)} different rows ({found.duplicates_removed} duplicates removed)"
    note(f"data       {found.origin}: {different}, {len(rows)} to train, {len(held_out)} held out")
    return rows, held_out, found
