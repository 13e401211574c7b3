"""Tests of the exercises.

    pytest docs/exercises -k lesson3    # your answers: docs/exercises/lesson3.py
pytest docs/exercises -k lesson3 --answers docs/exercises/solutions
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser) -> None:
    parser.addoption("--answers", default=str(HERE), help="the folder of lesson1.py, lesson2.py, …")


@pytest.fixture(scope="module")
def lesson(request):
    """The module with the answers to the lesson that a test file is about."""
    name = re.search(r"lesson\d+", request.module.__name__)[0]
    path = Path(request.config.getoption("--answers")).resolve() / f"{name}.py"
    if not path.is_file():
        raise pytest.UsageError(f"{path} does not exist: --answers names the folder of {name}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
