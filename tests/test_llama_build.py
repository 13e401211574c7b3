"""llama.cpp/build.sh: what can be missing is told in one line before anything is fetched or built."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = ROOT / "llama.cpp" / "build.sh"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the script in a checkout of its own, without a source, a build or an environment."""
    (tmp_path / "llama.cpp").mkdir()
    shutil.copy(SCRIPT, tmp_path / "llama.cpp")
    return tmp_path


def build(checkout: Path, *flags, tools=("bash", "dirname", "sed", "head", "awk", "df", "cat", "getconf"), **env):
    """Run the script with nothing but `tools` on the PATH."""
    bin_folder = checkout / "bin"
    bin_folder.mkdir(exist_ok=True)
    for tool in tools:
        link = bin_folder / tool
        if not link.exists():
            link.symlink_to(shutil.which(tool) or "/bin/true")
    return subprocess.run([shutil.which("bash"), checkout / "llama.cpp" / "build.sh", *flags], capture_output=True, text=True,
                          env={**os.environ, "PATH": str(bin_folder), **env}, timeout=60)


COMMON = ("bash", "dirname", "sed", "head", "awk", "df", "cat", "getconf")


@pytest.mark.parametrize("flags, tools, words, code", [
    (["--gpu"], COMMON, "unknown flag --gpu", 2),
    (["--cpu"], COMMON, "cmake is missing", 1),
    (["--cpu"], (*COMMON, "cmake"), "no C++ compiler", 1),
    (["--cuda"], (*COMMON, "cmake", "c++"), "nvcc is missing", 1),
    (["--cpu"], (*COMMON, "cmake", "c++"), "make setup", 1),
])
def test_what_is_missing_is_one_line(checkout, flags, tools, words, code):
    done = build(checkout, *flags, tools=tools)
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert sorted(p.name for p in (checkout / "llama.cpp").iterdir()) == ["build.sh"]


def test_a_full_disk_is_told_before_the_download(checkout):
    fake = checkout / "bin"
    fake.mkdir()
    (fake / "df").write_text("#!/bin/sh\necho header\necho disk 100 90 10240 90% /\n")
    (fake / "df").chmod(0o755)
    done = build(checkout, "--cpu", tools=("bash", "dirname", "sed", "head", "awk", "cat", "cmake", "c++"), PYTHON=shutil.which("python3"))
    assert done.returncode == 1 and "10 MB free" in done.stderr


def test_a_finished_build_is_left_alone(checkout):
    (checkout / "llama.cpp" / "build").mkdir()
    (checkout / "llama.cpp" / "build" / "proved").write_text("cpu\ncpu, for this processor\n")
    done = build(checkout, "--cpu")
    assert done.returncode == 0 and "nothing to do" in done.stderr
    assert "cmake is missing" in build(checkout, "--cuda").stderr  # another backend is another build
