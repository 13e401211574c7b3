"""A sample of benchmarks/faults.py: two trials of each kind, and a Trainer in which the kinds find faults."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import ROOT

FAULTS = ROOT / "benchmarks" / "faults.py"
# Real processes of several seconds each, and mounts; the whole run has them.
LONG = ("Ctrl-C while it starts", "odd environments of Python", "power cut, real file system")


def tried(out, *flags) -> tuple[subprocess.CompletedProcess, dict]:
    """The finished run and what it wrote."""
    command = [sys.executable, FAULTS, "--workers", "1", "--out", out / "faults", *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=600)
    written = out / "faults.json"
    assert written.exists(), done.stderr[-3000:]
    return done, json.loads(written.read_text())


def names() -> list[str]:
    listed = subprocess.run([sys.executable, FAULTS, "--list"], capture_output=True, text=True, check=True)
    return [line[:38].strip() for line in listed.stdout.splitlines()]


@pytest.mark.slow
def test_two_trials_of_every_kind_are_survived(tmp_path):
    kinds = [name for name in names() if name not in LONG]
    done, record = tried(tmp_path, "--systems", "qlora", "--trials", "2", "--kinds", *kinds)
    assert record["failed"] == [] and done.returncode == 0, json.dumps(record["failed"], indent=1)
    counts = {row["kind"]: row["qlora"]["trials"] for row in record["rows"] if not row["skipped"]}
    assert len(kinds) >= 20 and all(counts.values()), counts


@pytest.mark.slow
def test_the_same_trials_find_what_a_plain_trainer_lacks(tmp_path):
    # Trials that nothing could fail would say nothing
    kinds = ("planted code", "hostile and foreign adapters", "classes with odd names", "error at each file")
    done, record = tried(tmp_path, "--systems", "plain", "--trials", "12", "--kinds", *kinds)
    found = {row["kind"]: set(row["plain"]) - {"trials", "survived"} for row in record["rows"]}
    assert "code run" in found["planted code"] and all(found.values()), found
