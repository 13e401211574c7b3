"""Which versions of torch work with the other pinned packages: a training and the fast tests with each.

    python benchmarks/torch_versions.py old/bin/python new/bin/python   # writes results/torch_versions.json
    python benchmarks/torch_versions.py --failed old/bin/python         # after a fix: only what failed

Takes Pythons that have requirements-dev.txt with another torch. What the file says of other versions stays.
Half an hour for each on two cores. `make figures` writes the oldest and the newest version into the notebook,
which compares them with the torch that it finds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "torch_versions.json"
TRAINING = ("--model", "smollm2-135m", "--samples", "32", "--eval-samples", "8", "--max-length", "64")
TESTS = ("tests/core", "tests/memory", "tests/lab")  # the rooms that use torch's inner parts


def main(arguments: list[str]) -> None:
    pythons = [argument for argument in arguments if argument != "--failed"]
    if not pythons:
        sys.exit("error: name at least one Python that has another torch")
    known = {run["torch"]: run for run in json.loads(RESULT.read_text())} if RESULT.exists() else {}
    for python in pythons:
        ask = "import torch; print(torch.__version__)"
        told = subprocess.run([python, "-c", ask], text=True, capture_output=True, check=True).stdout
        version, _, build = told.strip().partition("+")
        if "--failed" not in arguments:
            run = {"torch": version, "build": build, "training": train(python)}
            known[version] = {**run, "tests": run_tests(python, TESTS)}
        elif (earlier := known[version]["tests"])["failed"]:
            again = run_tests(python, earlier["failed"])
            counts = {name: earlier[name] + again[name] for name in ("passed", "skipped")}
            known[version]["tests"] = again | counts
        print(json.dumps(known[version], indent=2))
    runs = sorted(known.values(), key=lambda run: number(run["torch"]))
    RESULT.write_text(json.dumps(runs, indent=2) + "\n")


def number(version: str) -> list[int]:
    """'2.13.0' -> [2, 13, 0]"""
    return [int(part) for part in version.split(".")]


def train(python: str) -> dict:
    """A few steps on the bundled model: losses, guards, and how far off the memory plan was."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, ROOT / "qlora_finetune.py", *TRAINING, "--output-dir", f"{folder}/run"]
        done = subprocess.run(command, text=True, capture_output=True)
        if done.returncode:
            return {"failed": done.stderr.strip().splitlines()[-1]}
        report = json.loads(Path(folder, "run", "report.json").read_text())
    memory = report["memory"]
    return {
        "device": report["environment"]["device_name"],
        "dtype": report["environment"]["dtype"],
        "steps": report["train"]["steps"],
        "loss_first": report["train"]["loss_first"],
        "loss_last": report["train"]["loss_last"],
        "guards_held": sum(guard["passed"] for guard in report["guards"]),
        "memory_error": memory["predicted_peak_bytes"] / memory["measured_peak_bytes"] - 1,
    }


def run_tests(python: str, tests: Sequence[str]) -> dict:
    """How many of these tests passed, and the names of those that did not."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            python,
            "-m",
            "pytest",
            "-n",
            "0",
            "-m",
            "not slow",
            f"--junitxml={folder}/tests.xml",
            *tests,
        ]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        cases = list(xml.parse(f"{folder}/tests.xml").iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(bad) - skipped, "skipped": skipped, "failed": sorted(map(named, bad))}


def named(case: xml.Element) -> str:
    """<testcase classname="tests.core.test_data" name="test_x[1]"> -> tests/core/test_data.py::test_x[1]"""
    return f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"


if __name__ == "__main__":
    main(sys.argv[1:])
