"""results/faults.md and faults.json: what was done, how often, and what came of it."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from trials.verdicts import FAILURES, SURVIVED

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")


def summary(kinds, results: list[dict], skipped: dict, flags) -> dict:
    """What faults.json holds; the single trials are in faults.jsonl."""
    rows = [
        _row(kind, [r for r in results if r["kind"] == kind.name], skipped.get(kind.name)) for kind in kinds
    ]
    total = {"kind": "total", "what": ""}
    for system in ("qlora", "plain"):
        counts = Counter()
        for row in rows:
            counts.update(row[system])
        total[system] = dict(counts)
    failed = [r for r in results if r["verdict"] != SURVIVED]
    return {
        "environment": environment(),
        "seed": flags.seed,
        "workers": flags.workers,
        "seconds": round(sum(r["seconds"] for r in results) / flags.workers, 1),
        "rows": rows,
        "total": total,
        "failed": [r for r in failed if r["system"] == "qlora"],
        "plain_failed": [r for r in failed if r["system"] == "plain"],
    }


def environment() -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            x.split(":")[1].strip()
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in x
        ]
        cpu = names[0] if names else cpu
    found = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    machine = {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform()}
    return {**machine, "date": datetime.date.today().isoformat(), "versions": found}


def _row(kind, results: list[dict], skipped: str | None) -> dict:
    row = {"kind": kind.name, "what": kind.what, "skipped": skipped}
    for system in ("qlora", "plain"):
        verdicts = Counter(r["verdict"] for r in results if r["system"] == system)
        row[system] = {"trials": sum(verdicts.values()), SURVIVED: 0, **verdicts}
    return row


def failures(counts: dict) -> str:
    """'2 lost, 1 traceback'; a dash for none."""
    names = (*FAILURES, "harness")
    return ", ".join(f"{counts[n]} {n}" for n in names if counts.get(n)) or "–"


def markdown(record: dict) -> str:
    head = (
        "kind",
        "what is done",
        "trials",
        "survived",
        "failures",
        "plain Trainer: trials",
        "survived",
        "failures",
    )
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * 2}{'--:|' * 2}---|{'--:|' * 2}---|"]
    for row in (*record["rows"], record["total"]):
        if row.get("skipped"):
            lines.append(f"| {row['kind']} | skipped: {row['skipped']} | – | – | – | – | – | – |")
            continue
        cells = [row["kind"], row["what"]]
        for system in ("qlora", "plain"):
            counts = row[system]
            empty = not counts.get("trials")
            cells += ["–"] * 3 if empty else [counts["trials"], counts[SURVIVED], failures(counts)]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return (
        "\n".join(["# Faults and attacks", "", *_about(record), "", *lines, "", *_worst(record)]).rstrip()
        + "\n"
    )


def _about(record: dict) -> list[str]:
    e = record["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in e["versions"].items())
    return [
        "Written by `python benchmarks/faults.py`, which explains the trials. Survived: it succeeded with",
        "exactly the right bytes, or refused with one `error:` line and the right exit code. After a fault",
        "in a run, the resumed one must end with the adapter of an uninterrupted run, to the byte.",
        "",
        f"{e['cpu']}, {e['cores']} cores, {e['system']}; {versions}; {e['date']}; seed {record['seed']},",
        f"{record['workers']} workers, {record['seconds']:.0f} s.",
    ]


def _worst(record: dict) -> list[str]:
    """One line for each different failure, worst first, at most thirty."""
    order = {name: i for i, name in enumerate((*FAILURES, "harness"))}
    seen, lines = set(), []
    for r in sorted(record["failed"], key=lambda r: order[r["verdict"]]):
        key = (r["kind"], r["verdict"], r["detail"][:60])
        if key in seen or len(lines) >= 30:
            continue
        seen.add(key)
        detail = " ".join(r["detail"].split())[:200].replace("|", "\\|")
        lines.append(
            f"- {r['verdict']}: {r['kind']} {json.dumps(r['trial'], ensure_ascii=True)[:200]}: {detail}"
        )
    return ["## What failed", "", *lines] if lines else []


def write(record: dict, out: Path) -> None:
    out.with_suffix(".json").write_text(json.dumps(record, indent=1, default=str) + "\n")
    out.with_suffix(".md").write_text(markdown(record))
