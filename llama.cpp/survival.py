"""What is left of training in a deployed form, and how much of its drift is only the form's rounding.

All by the log-odds of the two labels after each review: `trained` and `base` in transformers, `deployed` and
`form`: the trained model and the base alone, both in the form that is deployed. `base` and `form` may be of
the first rows only.
"""

import numpy as np

DRAWS, SEED = 2000, 0  # of the bootstrap


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def survival(deployed: np.ndarray, form: np.ndarray, trained: np.ndarray, base: np.ndarray) -> dict:
    """{share, low, high}: slope of what the form's answers changed by on what training changed, (rows,) each.

    share = Σ (deployed - form)(trained - base) / Σ (trained - base)²: 1 is all of it, 0 nothing, 2 twice as
    much. `low` and `high` are its 95% interval, from rows drawn again with replacement (bootstrap).
    """
    changed, left = trained - base, deployed - form
    along, size = changed * left, np.maximum(changed**2, 1e-30)
    drawn = np.random.default_rng(SEED).integers(len(changed), size=(DRAWS, len(changed)))
    low, high = np.percentile(along[drawn].sum(1) / size[drawn].sum(1), [2.5, 97.5])
    return {"share": float(along.sum() / size.sum()), "low": float(low), "high": float(high)}


def rounding(form: np.ndarray, trained: np.ndarray, base: np.ndarray) -> dict:
    """How far a form's rounding alone moves log-odds, in natural logarithms, (rows,) each.

    `of_base`, the base's drift (rms), holds all that is not the adapter's fault: the rounded weights, the
    other program's arithmetic, and what transformers rounds, as it computes `base` and `trained` alike. A
    tuned model spreads its answers further, and the same change of its weights moves them further in
    proportion: `sensitivity`. `noise` is what to expect of it. `effect` is what the adapter changes.
    """
    of_base, sensitivity = rms(form - base), max(1.0, float(trained.std() / max(base.std(), 1e-9)))
    effect = rms(trained - base)
    return {"of_base": of_base, "sensitivity": sensitivity, "noise": of_base * sensitivity, "effect": effect}
