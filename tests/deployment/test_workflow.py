"""The public workflow: pushes are tested with the pinned releases, once a week the newest are tried."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

WORKFLOW = yaml.load((ROOT / ".github/workflows/ci.yml").read_text(), yaml.BaseLoader)


def names(text: str) -> set[str]:
    return set(re.findall(r"^\w[\w-]*", text, re.M))


def test_only_the_schedule_tries_the_newest_so_no_push_turns_red():
    assert WORKFLOW["on"]["schedule"]
    conditions = {name: job["if"] for name, job in WORKFLOW["jobs"].items()}
    assert conditions["test"] == "github.event_name != 'schedule'"
    asked = re.findall(r"== '(\w+)'", conditions["newest"])
    assert asked == ["schedule", "workflow_dispatch"]


@pytest.fixture
def newest(tmp_path) -> Path:
    """newest.txt as the workflow's own commands write it."""
    script = next(s["run"] for s in WORKFLOW["jobs"]["newest"]["steps"] if "newest.txt" in s.get("run", ""))
    for name in ("requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    lines = "\n".join(line for line in script.splitlines() if line.startswith("sed "))
    subprocess.run(["bash", "-ec", lines], cwd=tmp_path, check=True)
    return tmp_path / "newest.txt"


def test_the_newest_are_all_of_requirements_without_their_pins(newest):
    text, dev = newest.read_text(), (ROOT / "requirements-dev.txt").read_text()
    runtime = names((ROOT / "requirements.txt").read_text())
    assert names(text) == runtime | names(dev)
    pinned = set(re.findall(r"^([\w-]+)==", text, re.M))
    assert len(runtime) > 20 and not pinned & runtime
    assert pinned == set(re.findall(r"^([\w-]+)==", dev, re.M))  # pytest and ruff stay
