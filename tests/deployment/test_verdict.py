"""The ladder's verdict on made-up answers: weak and strong adapters, rounding, faults of the weights."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "llama.cpp"))
from ladder import Replies, bound, broken_bounds, can_judge, cause, compare
from survival import rounding, survival

ROWS, ROUNDS = 64, 0.03  # reviews; rms of what 8 bits do to the base's log-odds
ANSWERS = ("Negative", "Positive")
STRICT, LOOSE = bound("merged", "Q8_0", False), bound("merged", "Q4_0", False)
# What training adds to the base's log-odds: (mean, spread)
ADAPTERS = {"very weak": (0.4, 0.2), "weak": (0.6, 0.4), "medium": (-0.3, 1.0), "strong": (0.0, 4.0)}
rng = np.random.default_rng(3)
BASE = rng.normal(0.2, 0.5, ROWS)
DIRECTION, NOISE = rng.normal(size=ROWS), rng.normal(size=(2, ROWS))
OTHER = rng.normal(size=ROWS)


def said(odds, base=None, scaled=None) -> Replies:
    """Answers with these log-odds."""
    p = 1 / (1 + np.exp(-odds))
    logprobs = list(np.log(np.stack([1 - p, p], 1)))
    return Replies([[1]] * ROWS, odds, logprobs, logprobs[:1], ["Paris."], {}, base, scaled=scaled or {})


def trained_by(adapter: str) -> Replies:
    mean, spread = ADAPTERS[adapter]
    effect = mean + spread * DIRECTION
    return said(BASE + effect, BASE, {s: (BASE + s * effect)[:16] for s in (0, 0.25, 0.5, 1, 2, 4)})


def in_8_bits(trained: Replies, strength=1.0, times=1.0, add=0.0) -> Replies:
    """A file whose rounding moves it twice as far as the base, half of that all rows alike; `add` on top."""
    rounded = times * ROUNDS * (1 + 1.7 * NOISE[0])
    return said(BASE + strength * (trained.odds - BASE) + rounded + add, BASE + ROUNDS * NOISE[1])


def verdict(trained: Replies, file: Replies, wanted=STRICT) -> str:
    """All that the ladder says of it; "" if it passes."""
    figures = compare(trained, file, [0] * ROWS, ANSWERS)
    broken = broken_bounds(figures, wanted)
    return "; ".join([*broken, cause(trained, file, figures, str)]) if broken else ""


each_adapter = pytest.mark.parametrize("adapter", ADAPTERS)


def test_survival_by_hand():
    """Training moved the rows by 1, 2 and -2; the file by half of that; the form shifts all by 0.1."""
    base, changed = np.array([0.0, 1.0, -1.0]), np.array([1.0, 2.0, -2.0])
    form = base + 0.1
    left = survival(form + changed / 2, form, base + changed, base, 0)
    assert left == pytest.approx({"share": 0.5, "low": 0.5, "high": 0.5})
    # (1·1 + 2·2 + 2·1) / (1 + 4 + 4)
    left = survival(form + np.array([1.0, 2.0, -1.0]), form, base + changed, base, 0)
    assert left["share"] == pytest.approx(7 / 9) and left["low"] < 7 / 9 < left["high"]
    # Noise of 0.1 beside an effect of √3 (rms): ± 2 · 0.1 / √3
    left = survival(form + changed / 2, form, base + changed, base, 0.1)
    assert left["high"] - 0.5 == pytest.approx(0.5 - left["low"]) == pytest.approx(0.2 / 3**0.5)


def test_noise_is_the_bases_drift_and_at_least_the_merges():
    base = np.array([1.0, -1.0])
    found = rounding(base + 0.1, 3 * base, base, 0.0)
    assert found == pytest.approx({"of_base": 0.1, "noise": 0.1, "effect": 2})
    assert rounding(base + 0.1, 3 * base, base, 0.3)["noise"] == 0.3


@each_adapter
def test_rounding_is_no_fault(adapter):
    trained = trained_by(adapter)
    assert verdict(trained, in_8_bits(trained)) == ""


def test_flips_near_zero_do_not_count():
    """Regression: a healthy Q8_0 was called broken: 64 rows, and an adapter that leaves many near zero."""
    trained = trained_by("weak")
    trained.odds[:20] = np.linspace(-0.04, 0.04, 20)
    file = in_8_bits(trained)
    figures = compare(trained, file, [0] * ROWS, ANSWERS)
    assert figures["disagreements"] > 3  # what the bound was before
    assert figures["sure"]["disagreements"] == 0 and verdict(trained, file) == ""


def test_flips_far_from_zero_count():
    trained = trained_by("strong")
    file = in_8_bits(trained)
    surest = np.argsort(-np.abs(trained.odds))[:3]
    file.odds[surest] = -0.1 * np.sign(trained.odds[surest])
    assert "3 labels differ that rounding can't explain" in verdict(trained, file)


FAULTS = {
    "half": ({"strength": 0.5}, "acts like 0.5 times"),
    "lost": ({"strength": 0.0}, "not applied"),
    "doubled": ({"strength": 2.0}, "acts like 2 times"),
    "alpha/r of rsLoRA": ({"strength": 0.25}, "acts like 0.25 times"),
    "fewer bits before": ({"times": 8.0}, "rounded before"),
}


@each_adapter
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_called_by_its_name(adapter, fault):
    options, words = FAULTS[fault]
    trained = trained_by(adapter)
    assert words in verdict(trained, in_8_bits(trained, **options))


@each_adapter
def test_another_adapter_is_found(adapter):
    """As strong, for another task."""
    trained = trained_by(adapter)
    mean, spread = ADAPTERS[adapter]
    other = said(BASE + mean + spread * OTHER, BASE)
    assert "another adapter" in verdict(trained, in_8_bits(other))


@each_adapter
def test_another_base_is_found(adapter):
    """It says something else of the same reviews, with the same adapter on it."""
    trained = trained_by(adapter)
    assert "another base" in verdict(trained, in_8_bits(trained, add=0.4 * OTHER))


def test_an_adapter_smaller_than_rounding_is_not_judged():
    """Neither lost nor kept can be said of it; it does not fail for that."""
    trained = said(BASE + 0.01 * DIRECTION, BASE)
    for strength in (1.0, 0.0):
        file = in_8_bits(trained, strength)
        assert not can_judge(compare(trained, file, [0] * ROWS, ANSWERS)) and verdict(trained, file) == ""


def test_low_bits_are_held_to_less():
    """A Q4_0 file that keeps 80% of the effect passes as Q4_0; as Q8_0 it would not."""
    trained = trained_by("strong")
    file = in_8_bits(trained, 0.8)
    file.base = BASE + 3 * ROUNDS * NOISE[1]
    assert verdict(trained, file, LOOSE) == ""
    assert "of what training changed is left, bound 90%" in verdict(trained, file, STRICT)


def test_with_a_grid_only_its_own_file_is_what_was_trained():
    own, others = bound("merged", "Q4_0", False, "Q4_0"), ("f16", "Q8_0", "Q5_K_M")
    assert own == STRICT
    for kind, name in [*(("merged", other) for other in others), ("lora", ""), ("transformers", "f16")]:
        assert not bound(kind, name, True, "Q4_0").strict
    trained = trained_by("strong")
    assert "acts like 0.5 times" in verdict(trained, in_8_bits(trained, strength=0.5), own)
    assert verdict(trained, in_8_bits(trained), own) == ""
