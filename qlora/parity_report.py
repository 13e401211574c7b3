"""The parity ladder as a table and a picture."""

from __future__ import annotations

import math
from pathlib import Path

from qlora.report import percent

HEADS = ("rung", "MB", "bits/weight", "same ids", "agreement", "accuracy (95% interval)", "Δ log-odds mean, max", "KL mean, max",
         "free KL", "free text", "prefill tok/s", "decode tok/s", "load s", "bound")


KEY = (
    "agreement: the same label as the model that was trained; Δ log-odds: how far log P(answer 2) - log P(answer 1) moved;",
    "KL: nats between the next-token distributions after a review, free KL: after a free prompt; free text: share of the reference's",
    "text before the first difference. Every file is asked through llama-server, the first two rows are transformers.",
)


def cells(r: dict) -> list[str]:
    """One rung's row, in the order of HEADS."""
    size = [f"{r['bytes'] / 1e6:.0f}", f"{r['bits_per_weight']:.2f}"] if "bytes" in r else ["", ""]
    if "kl" not in r:
        return [r["name"], *size, *[""] * 10, "broken"]
    right = r["accuracy"]
    verdict = "broken" if r["broken"] else "ok, at least " + percent(r["bound"]["agreement"]) if r["bound"]["agreement"] else ""
    return [
        r["name"], *size, "yes" if r["prompt_ids_equal"] else "NO", percent(r["agreement"]),
        f"{percent(right['accuracy'])} ({100 * right['low']:.1f} to {100 * right['high']:.1f})",
        f"{r['log_odds_shift']['mean']:.3f}, {r['log_odds_shift']['max']:.2f}", f"{r['kl']['mean']:.2g}, {r['kl']['max']:.2g}",
        f"{r['free']['kl_mean']:.4f}", percent(r["free"]["same_text"]),
        f"{r['prefill_tokens_per_second']:.0f}", f"{r['decode_tokens_per_second']:.1f}", "" if r["load_seconds"] is None else f"{r['load_seconds']:.1f}", verdict,
    ]


def table(results: list[dict]) -> str:
    rows = [list(HEADS), *map(cells, results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADS))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def markdown(results: list[dict]) -> str:
    lines = [*KEY, "", "| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS), *("| " + " | ".join(cells(r)) + " |" for r in results)]
    broken = [f"- {r['name']}: {'; '.join(r['broken'])}" + (f" (likely: {r['cause']})" if r["cause"] else "") for r in results if r["broken"]]
    return "\n".join([*lines, *(["", "Broken:", "", *broken] if broken else [])]) + "\n"


def draw(path: Path, results: list[dict]) -> None:
    """Every file's size, accuracy, distance from the trained model and decoding speed; the trained model is the dashed line."""
    from matplotlib.ticker import NullFormatter

    from qlora.pictures import COLOURS, new_axes, save

    trained, files = results[0], sorted((r for r in results if "bytes" in r and "kl" in r), key=lambda r: -r["bytes"])
    figure, (size, right, distance, speed) = new_axes(width=11, height=1.4 + 0.4 * max(len(files), 3), ncols=4, sharey=True)
    for y, r in enumerate(files):
        colour, accuracy = COLOURS[3] if r["kind"] == "lora" else COLOURS[0], r["accuracy"]
        size.barh(y, r["bytes"] / 1e6, color=colour)
        right.errorbar([100 * accuracy["accuracy"]], [y], xerr=[[100 * (accuracy["accuracy"] - accuracy["low"])], [100 * (accuracy["high"] - accuracy["accuracy"])]],
                       fmt="o", color=colour, capsize=3)
        distance.plot([max(r["kl"]["mean"], 1e-6)], [y], "o", color=colour)
        speed.barh(y, r["decode_tokens_per_second"], color=colour)
    for axes, value in ((right, 100 * trained["accuracy"]["accuracy"]), (speed, trained["decode_tokens_per_second"])):
        axes.axvline(value, color=COLOURS[6], linestyle="--", linewidth=1)
    distance.set_xscale("log")
    low, high = distance.get_xlim()
    distance.set_xlim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))  # whole decades: those have labels
    distance.xaxis.set_minor_formatter(NullFormatter())
    size.set(yticks=range(len(files)), yticklabels=[r["name"] + (" (broken)" if r["broken"] else "") for r in files], xlabel="size, MB")
    right.set(xlabel=f"accuracy, %\n({trained['accuracy']['rows']} reviews, 95% interval)")
    distance.set(xlabel=f"mean KL from\n{trained['name']}, nats")
    speed.set(xlabel=f"decoding, tokens/s\n(dashed: {trained['name']}\nin transformers)")
    save(figure, path)
