from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from scipy.stats import ttest_rel

from config import BUNDLED, ROOT
from qlora.sources import locate

PAIRS = {"he": "she", "him": "her"}


def test_lesson8_1_words_are_swapped_both_ways(lesson):
    found = lesson.swapped("He met the heroine before she met him.", PAIRS)
    assert "eroine" in found and "sheroine" not in found, "whole words only: 'he' also begins 'heroine'"
    assert found != "He met the heroine before he met him.", (
        "swapping one way after the other undoes the first"
    )
    assert found == "She met the heroine before he met her."


def test_lesson8_1_twice_is_the_text_again(lesson):
    text = "Her film, his film: she laughed, HE said."
    assert lesson.swapped(lesson.swapped("He told her. Then she told him.", PAIRS), PAIRS) == (
        "He told her. Then she told him."
    )
    assert lesson.swapped(text, {"film": "book"}) == text.replace("film", "book"), (
        "other words stay as they are"
    )


def test_lesson8_1_only_the_differences_count(lesson):
    found = lesson.paired_shift([-8.0, 0.0, 9.0], [-7.5, 0.5, 9.5])
    assert found == pytest.approx((0.5, 0.5, 0.5)), (
        "all reviews moved by 0.5: nothing is uncertain about that"
    )


def test_lesson8_1_the_interval_is_students(lesson):
    # Differences 0, 1, 2: mean 1, standard deviation 1, error 1/sqrt(3), t of 2 degrees of freedom 4.303
    half = 4.30265 / math.sqrt(3)
    found = lesson.paired_shift([5.0, 5.0, 5.0], [5.0, 6.0, 7.0])
    assert found[0] == pytest.approx(1.0), "the mean of other - against"
    assert found == pytest.approx((1, 1 - half, 1 + half), abs=1e-4), (
        "t with n - 1 degrees, spread with n - 1"
    )


def test_lesson8_1_it_is_that_of_scipy(lesson):
    against, other = [0.3, -2.0, 4.1, 1.0, 0.0], [0.9, -2.5, 4.0, 2.2, 1.0]
    low, high = ttest_rel(other, against).confidence_interval()
    assert lesson.paired_shift(against, other)[1:] == pytest.approx((low, high))


@functools.lru_cache
def bundled():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = locate(BUNDLED)[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def test_lesson8_2_log_p_of_what_the_bundled_model_says(lesson):
    model, tokenizer = bundled()
    beginning, paris, rome = (tokenizer.encode(t) for t in ("The capital of France is", " Paris", " Rome"))
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([beginning])).logits[0, -1].log_softmax(-1)
    found = lesson.log_p_of_ending(model, beginning, paris)
    assert found == pytest.approx(logs[paris[0]].item(), abs=1e-3), "position i is about the token at i + 1"
    assert found > lesson.log_p_of_ending(model, beginning, rome)


def test_lesson8_2_endings_of_several_tokens_are_products(lesson):
    model, tokenizer = bundled()
    ids = tokenizer.encode("The capital of France is Paris. It is a large city.")
    at_once = lesson.log_p_of_ending(model, ids[:5], ids[5:])
    in_parts = lesson.log_p_of_ending(model, ids[:5], ids[5:8]) + lesson.log_p_of_ending(
        model, ids[:8], ids[8:]
    )
    assert at_once == pytest.approx(in_parts, abs=1e-2), "log P of all tokens together: a sum, not a mean"


def test_lesson8_2_exposure_is_in_bits(lesson):
    assert lesson.exposure(-1.0, [-2.0, -3.0, -4.0]) == 2, "first of four candidates: two bits"
    assert lesson.exposure(-4.0, [-1.0, -2.0, -3.0]) == 0, "the last one to be tried: nothing is given away"
    assert lesson.exposure(-2.0, [-1.0] + [-9.0] * 1022) == 9, "second of 1,024: 10 bits less one"


def test_lesson8_3_a_counter_in_microjoules(lesson):
    assert lesson.joules(1_000_000, 66_000_000, 10**9) == pytest.approx(65), "65 J: a second at 65 W"
    assert lesson.joules(5, 5, 10**9) == 0


def test_lesson8_3_a_counter_that_began_again(lesson):
    found = lesson.joules(990_000_000, 10_000_000, 1_000_000_000)
    assert found == pytest.approx(20), "10 J to the end and 10 J from there: it never runs backwards"


def test_lesson8_3_kilowatt_hours(lesson):
    assert lesson.kilowatt_hours(3600, 1000) == pytest.approx(1)
    assert lesson.kilowatt_hours(1, 3_600_000) == pytest.approx(1), "1 kWh is 3.6 million joules"


def test_lesson8_3_the_default_run(lesson):
    seconds = json.loads((ROOT / "benchmarks/results/default_run.json").read_text())["seconds"]
    found = lesson.kilowatt_hours(seconds, 65)
    assert found == pytest.approx(seconds * 65 / 3.6e6), "watts times seconds are joules"
