"""What is left of training in a deployed form, and how much of its drift is only the form's rounding.

All by the log-odds of the two labels after each review: `trained` and `base` in transformers, `deployed` and
`form`: the trained model and the base alone, both in the form that is deployed. `base` and `form` may be of
the first rows only.
"""

import numpy as np

DRAWS, SEED = 2000, 0  # of the bootstrap


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def rounding(form: np.ndarray, trained: np.ndarray, base: np.ndarray, merge_drift: float) -> dict:
    """How far a form's rounding alone moves log-odds, in natural logarithms, (rows,) each.

    `of_base`, the base's drift (rms), is not the adapter's fault: the rounded weights, the other program's
    arithmetic, and what transformers rounds itself. It is what to expect of the trained model, too, however
    wide an adapter spreads the log-odds. `merge_drift` is that of the trained model's 16-bit merge, of which
    every merged file is made: `noise` is at least that. `effect` is what the adapter changes (rms).
    """
    of_base = rms(form - base)
    return {"of_base": of_base, "noise": max(of_base, merge_drift), "effect": rms(trained - base)}


def survival(
    deployed: np.ndarray, form: np.ndarray, trained: np.ndarray, base: np.ndarray, noise: float
) -> dict:
    """{share, low, high}: slope of what the form's answers changed by on what training changed, (rows,) each.

    share = Σ (deployed - form)(trained - base) / Σ (trained - base)²: 1 is all of it, 0 nothing, 2 twice as
    much. `low` and `high` are its 95% interval, of two parts added as squares: rows drawn again with
    replacement (bootstrap), and rounding that moves all rows alike, as it mostly does, by 2 `noise`.
    """
    changed, left = trained - base, deployed - form
    along, size = changed * left, np.maximum(changed**2, 1e-30)
    drawn = np.random.default_rng(SEED).integers(len(changed), size=(DRAWS, len(changed)))
    share, shift = along.sum() / size.sum(), 2 * max(noise, 1e-9) / np.sqrt(size.mean())
    low, high = np.percentile(along[drawn].sum(1) / size[drawn].sum(1), [2.5, 97.5])
    low, high = share - np.hypot(share - low, shift), share + np.hypot(high - share, shift)
    return {"share": float(share), "low": float(low), "high": float(high)}
