"""One style for all pictures: readable at 800 pixels and without colour vision."""

from pathlib import Path

from qlora.files import staged

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
    """Write a PNG."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    with staged(path) as part:
        figure.savefig(part, dpi=120, format="png")
    plt.close(figure)
