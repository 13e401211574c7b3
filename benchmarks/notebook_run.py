"""Runs notebooks/qlora_t4.ipynb from top to bottom, and measures each cell.

    python benchmarks/notebook_run.py                  # some minutes; writes results/notebook.json
    python benchmarks/notebook_run.py --keep run.ipynb # also keeps the notebook with its outputs

It runs in a folder of its own, so nothing of an earlier run is found. Needs requirements-dev.txt. Seconds are
those of one run. `make figures` then writes them into the notebook's texts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NOTEBOOK = ROOT / "notebooks" / "qlora_t4.ipynb"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--keep", type=Path, help="write the notebook with its outputs here")
    keep = flags.parse_args().keep
    with tempfile.TemporaryDirectory() as folder:
        notebook = execute(read(), {"WORK": folder}, NOTEBOOK.parent)
        report = json.loads(Path(folder, "imdb", "report.json").read_text())["environment"]
    if keep:
        nbformat.write(notebook, keep)
    record = {"device": report["device_name"].partition(",")[0], "threads": report["threads"]}
    record["seconds"] = seconds(notebook)
    record["all_seconds"] = round(sum(record["seconds"].values()), 1)
    (RESULTS / "notebook.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def read(without: tuple[str, ...] = ()) -> nbformat.NotebookNode:
    """The committed notebook, without the named cells."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id not in without]
    return notebook


def execute(notebook: nbformat.NotebookNode, settings: dict, folder: Path) -> nbformat.NotebookNode:
    """Run it in `folder`, with `settings` in a cell after the settings', as papermill does.

    Raises nbclient's CellExecutionError, which shows the cell's output, where a cell fails.
    """
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())]
    lines = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell(lines, id="injected-settings"))
    client = NotebookClient(notebook, timeout=3600, kernel_name="python3")
    return client.execute(cwd=str(folder))


def seconds(notebook: nbformat.NotebookNode) -> dict[str, float]:
    """Cell's name -> the time between its start and its end, as the kernel told them."""
    took = {}
    for cell in notebook.cells:
        if told := cell.metadata.get("execution"):
            start, end = (datetime.fromisoformat(told[f"iopub.status.{state}"]) for state in ("busy", "idle"))
            took[cell.id] = round((end - start).total_seconds(), 1)
    return {name: value for name, value in took.items() if name not in ("settings", "injected-settings")}


def output(cell) -> str:
    """What a cell printed; of a line that a progress bar wrote again and again, the last state."""
    text = "".join(part.get("text", "") for part in cell.outputs).replace("\r\n", "\n")
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))


if __name__ == "__main__":
    sys.exit(main())
