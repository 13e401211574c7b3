"""Finished runs side by side (qlora_inference.py --runs), a line for each report.json; loads no model."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from qlora.cli import UserError, require
from qlora.files import read_json
from qlora.tables import table

REPORT = "report.json"
HEADERS = (
    "folder",
    "finished",
    "model",
    "precision",
    "objective",
    "rows",
    "steps",
    "loss",
    "score",
    "minutes",
)


def show_runs(folders: Sequence[Path]) -> None:
    """Print the table of the runs in these folders, or in their subfolders; the newest comes last."""
    found = {path for folder in folders for path in [folder / REPORT, *folder.glob(f"*/{REPORT}")]}
    reports = sorted(path for path in found if path.is_file())
    where = " ".join(map(str, folders))
    require(bool(reports), f"--runs {where}: no folder there holds a {REPORT}")
    rows = sorted((row_of(path) for path in reports), key=lambda row: (row[1], row[0]))
    print(table(HEADERS, rows, left=5))
    print("score: of held-out rows, before -> after training (95% interval)")


def row_of(path: Path) -> tuple[str, ...]:
    """A run's cells; of a report that can't be read its name, the file's date, and why."""
    name = path.parent.name or path.parent.resolve().name
    written = datetime.fromtimestamp(path.stat().st_mtime).astimezone()
    try:
        return (name, *cells(read_json(path, ""), written))
    except UserError:
        why = "damaged: not a JSON object"
    except OSError as error:
        why = f"can't be read ({error.strerror})"
    except (KeyError, TypeError, ValueError, AttributeError):
        why = "damaged, or of another program"
    return (name, f"{written:%Y-%m-%d %H:%M}", f"{REPORT} is {why}", *[""] * (len(HEADERS) - 3))


def cells(report: dict, written: datetime) -> list[str]:
    """All but the name. `written`: the file's date, for versions that did not say when a run ended."""
    settings, train, evaluation = report["settings"], report["train"], report["evaluation"]
    ended = datetime.fromisoformat(report["finished"]) if "finished" in report else written
    objective = str(settings["objective"])
    if objective == "sentiment" and "tuned" not in evaluation:
        objective = "chat"
    return [
        f"{ended:%Y-%m-%d %H:%M}",
        str(report["base"]["name"]),
        str(settings["precision"]),
        objective,
        f"{report['data']['train_rows']}",
        f"{train['steps']}",
        f"{train['loss_first']:.2f} -> {train['loss_last']:.2f}",
        score(evaluation),
        f"{report['seconds'] / 60:.1f}",
    ]


def score(evaluation: dict) -> str:
    """'54.0% -> 92.5% (89.5 to 94.7)', 'perplexity 25.31 -> 18.20', 'pairs 51.0% -> 70.5% (63.8 to 76.4)'"""
    if "perplexity" in evaluation:
        both = (evaluation["perplexity"][when]["perplexity"] for when in ("before", "after"))
        return "perplexity " + " -> ".join(f"{value:.2f}" for value in both)
    if "pairs" in evaluation:
        before, after = evaluation["pairs"]["before"], evaluation["pairs"]["after"]
    else:
        before, after = evaluation["base_zero_shot"], evaluation["tuned"]
    interval = f"{100 * after['low']:.1f} to {100 * after['high']:.1f}"
    pairs = "pairs " if "pairs" in evaluation else ""
    return f"{pairs}{100 * before['accuracy']:.1f}% -> {100 * after['accuracy']:.1f}% ({interval})"
