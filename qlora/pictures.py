"""Pictures of the quantization lab: one style for all of them, readable at 800 pixels and without colour vision."""

from __future__ import annotations

import os
from pathlib import Path

# Okabe and Ito's palette; let markers or line styles differ as well, for print in grey.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"]


def new_axes(width: float = 8, height: float = 4.5, **subplots):
    """(figure, axes) of `width` x `height` inches; further arguments go to plt.subplots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        return plt.subplots(figsize=(width, height), **subplots)


def save(figure, path: Path) -> None:
    """Write a PNG; under a temporary name first, so that a reader never sees half a picture."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    figure.tight_layout()
    figure.savefig(staged, dpi=120, format="png")
    plt.close(figure)
    os.replace(staged, path)


def draw_levels(path: Path, weight, name: str) -> None:
    """Histogram of a layer's 16-bit weights over their block's largest value, and under it the levels of the 4-bit types."""
    from qlora.formats import BLOCK, CODEBOOKS, to_blocks

    blocks = to_blocks(weight).cpu()
    scaled = (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)).flatten().numpy()
    figure, (top, bottom) = new_axes(nrows=2, sharex=True, height_ratios=(3, 1.3))
    top.hist(scaled, bins=100, range=(-1, 1), weights=[100 / len(scaled)] * len(scaled), color=COLOURS[5])
    top.set(ylabel="% of weights", title=f"{name}: {weight.shape[0]} x {weight.shape[1]} weights in blocks of {BLOCK}")
    rows = (("nf4", "NF4", "|", 14, COLOURS[0]), ("fp4", "FP4", "^", 7, COLOURS[3]), ("int4", "int4, uniform", "o", 7, COLOURS[6]))
    for row, (kind, _, marker, size, colour) in enumerate(rows):
        levels = CODEBOOKS[kind].unique()
        bottom.plot(levels, [-row] * len(levels), marker, color=colour, markersize=size, markeredgewidth=2 if marker == "|" else 1)
    for level in CODEBOOKS["nf4"].tolist():
        top.axvline(level, color=COLOURS[0], linewidth=0.6, linestyle=":")
    bottom.set(yticks=[-row for row in range(len(rows))], yticklabels=[label for _, label, *_ in rows], ylim=(-2.6, 0.6),
               xlim=(-1.03, 1.03), xlabel="weight / largest absolute value of its block (dotted: NF4's levels)")
    save(figure, path)
