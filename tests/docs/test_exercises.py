"""docs/exercises: every test fails before, passes with the solution, and fails with a wrong answer."""

from __future__ import annotations

import gc
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT

EXERCISES = ROOT / "docs" / "exercises"
WRONG = Path(__file__).parent / "wrong_answers"


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


LESSONS = sorted(path.stem for path in EXERCISES.glob("lesson[0-9].py"))
TESTS = {name: module(EXERCISES / f"test_{name}.py") for name in LESSONS}
SOLUTIONS = {name: module(EXERCISES / "solutions" / f"{name}.py") for name in LESSONS}


@pytest.fixture(scope="module", autouse=True)
def models_are_let_go():
    """Tests of other files count the memory of all tensors that are there; these keep whole models."""
    yield
    for each in (*TESTS.values(), *SOLUTIONS.values()):
        for value in vars(each).values():
            getattr(value, "cache_clear", lambda: None)()
    gc.collect()


def of_lesson(lesson: str) -> dict[str, object]:
    """{'test_lesson3_1_scaling': its function, …}"""
    return {name: value for name, value in vars(TESTS[lesson]).items() if name.startswith(f"test_{lesson}_")}


ALL = [(lesson, name) for lesson in LESSONS for name in of_lesson(lesson)]
# wrong_answers/lesson3.py: e1_scaling__without_alpha is `scaling` of exercise 1 with a mistake
MISTAKES = [
    (lesson, name) for lesson in LESSONS for name in vars(module(WRONG / f"{lesson}.py")) if name[:1] == "e"
]


def test_every_lesson_has_three_exercises_and_a_wrong_answer_to_each():
    assert [f"lesson{n}" for n in range(1, 9)] == LESSONS
    for lesson in LESSONS:
        assert {name.split("_")[2] for name in of_lesson(lesson)} == {"1", "2", "3"}, lesson
        assert {name[1] for of, name in MISTAKES if of == lesson} == {"1", "2", "3"}, lesson


@pytest.mark.parametrize("lesson, name", ALL)
def test_fails_before(lesson, name):
    with pytest.raises(NotImplementedError):
        of_lesson(lesson)[name](module(EXERCISES / f"{lesson}.py"))


@pytest.mark.parametrize("lesson, name", ALL)
def test_passes_with_the_solution(lesson, name):
    of_lesson(lesson)[name](SOLUTIONS[lesson])


@pytest.mark.parametrize("lesson, mistake", MISTAKES)
def test_a_wrong_answer_is_found(lesson, mistake):
    number, function = mistake[1], mistake[3:].partition("__")[0]
    assert hasattr(SOLUTIONS[lesson], function), f"no exercise has a function {function}"
    answers = {**vars(SOLUTIONS[lesson]), function: getattr(module(WRONG / f"{lesson}.py"), mistake)}
    failed = []
    for name, test in of_lesson(lesson).items():
        if name.split("_")[2] == number:
            try:
                test(SimpleNamespace(**answers))
            except AssertionError:
                failed.append(name)
    assert failed, f"no test of exercise {number} notices {mistake}"
