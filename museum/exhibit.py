"""Plant one bug beside a healthy run, and show what one sees and what catches it."""

import gc
import math
import shutil
import tempfile
import textwrap
import time
from pathlib import Path

from museum.bug import Bug, message_of
from museum.job import Job, Run, deploy, same_training, train
from museum.texts import TEXTS
from qlora.cli import note
from qlora.tables import table

BLOCKS, WIDTH = "▁▂▃▄▅▆▇█", 30
NOTHING = "nothing: no guard said a word"


def sparkline(values: list[float], low: float, high: float) -> str:
    """Heights of the values on a logarithmic scale from low to high, WIDTH characters at most."""
    width = min(WIDTH, len(values))
    ends = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(ends, ends[1:])]
    scale = math.log(high / low) or 1.0
    heights = (math.log(max(mean, low) / low) / scale for mean in means)
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(height * len(BLOCKS)))] for height in heights)


def curves(losses: dict[str, list[float]]) -> list[str]:
    """'loss, healthy  █▅▂▁  5.91 -> 0.42', on one scale for all."""
    every = [max(value, 0.05) for values in losses.values() for value in values]
    ends = {name: (mean(values[:2]), mean(values[-5:])) for name, values in losses.items()}
    longest = max(map(len, losses))
    return [
        f"loss, {name:{longest}}  {sparkline(values, min(every), max(every))}  "
        f"{ends[name][0]:.2f} -> {ends[name][1]:.2f}"
        for name, values in losses.items()
    ]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def look(bug: Bug, run: Run) -> dict:
    """What is seen and measured of one run; where its folders are is none of the reader's business."""
    said = message_of(bug.check, run).replace(f"{run.folder.parent}/", "")
    return {"losses": run.losses, "measured": bug.measure(run), "said": said}


def visit(bug: Bug, job: Job) -> dict:
    """Train and deploy a healthy job and the planted one; what both showed."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name).resolve()
        healthy_job = bug.stage(job, scratch)
        planted_job = bug.plant(healthy_job)
        run = deploy(train(healthy_job), healthy_job, scratch / "adapter")
        healthy = look(bug, run)
        shared = same_training(healthy_job, planted_job)
        if not shared:
            del run  # one model at a time
            gc.collect()
            run = train(planted_job)
        shutil.rmtree(scratch / "adapter")
        planted = look(bug, deploy(run, planted_job, scratch / "adapter"))
    caught = bool(planted["said"]) and not healthy["said"]
    found = {"name": bug.name, "caught": caught, "shared": shared, "healthy": healthy, "planted": planted}
    return found | {"seconds": round(time.perf_counter() - started, 1)}


def show(bug: Bug, found: dict) -> None:
    text, both = TEXTS[bug.name], {name: found[name] for name in ("healthy", "planted")}
    print(f"{bug.name}: {text.title}\n")
    losses = {"both": found["healthy"]["losses"]} if found["shared"] else None
    print("\n".join(curves(losses or {name: each["losses"] for name, each in both.items()})), end="\n\n")
    rows = [
        [what, *(each["measured"][what] for each in both.values())] for what in found["healthy"]["measured"]
    ]
    print(table(["", *both], rows, indent=0), end="\n\n")
    if found["healthy"]["said"]:
        told("false", f"the healthy run is accused, too: {found['healthy']['said']}")
    told("caught" if found["caught"] else "missed", found["planted"]["said"] or NOTHING)
    told("by", text.guard)
    told("cause", text.cause)
    told("fix", text.fix)
    for link in text.links:
        told("seen in", link)
    if words := bug.note():
        told("note", words)
    note(f"           {found['seconds']:.0f} s")


def told(name: str, text: str) -> None:
    """'cause    The labels cover …', wrapped and indented."""
    lines = textwrap.wrap(text, 92, break_long_words=False, break_on_hyphens=False)
    print(f"{name:9}" + f"\n{'':9}".join(lines), flush=True)


def as_record(found: dict) -> dict:
    """For a result file: the ends of the loss curves, what was measured, what was said."""
    record = {**found, "title": TEXTS[found["name"]].title, "what": next(iter(found["healthy"]["measured"]))}
    for name in ("healthy", "planted"):
        losses, measured = found[name]["losses"], found[name]["measured"]
        said = found[name]["said"].replace("|", "\\|")  # it stands in a table of docs/museum.md
        ends = {"first": mean(losses[:2]), "last": mean(losses[-5:])}
        record[name] = {**ends, "measured": measured, "key": next(iter(measured.values())), "said": said}
    return record
