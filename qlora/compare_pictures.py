"""What a comparison of precisions shows: its table, what the rows say, and its pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from qlora.pictures import COLOURS, new_axes, save

FOUR_BIT = ("fp4", "nf4", "nf4-dq", "torchao-int4wo")
PAPER = {"nf4-dq": "27.41", "fp4": "29.48 to 31.07", "torchao-int4wo": "34.34"}  # perplexities in arXiv 2305.14314, table 2
HEADER = f"""\
{'':16}{'bits per weight':>16}{'footprint':>11}{'load':>7}{'weight':>9}{'KL to':>11}{'':12}  {'zero-shot accuracy':22}{'prefill':>8}{'decode':>8}
{'precision':16}{'model':>8}{'linear':>8}{'MB':>11}{'s':>7}{'error':>9}{'reference':>11}{'perplexity':>12}  {'(95% interval)':22}\
{'tok/s':>8}{'tok/s':>8}"""
LINES = [("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"), ("v", "-"), ("P", "--"), ("X", "-.")]


def print_header(title: str, text: dict) -> None:
    print(f"{title}; the same held-out IMDB text for all:\n"
          f"perplexity and prefill of {text['rows']} reviews x {text['tokens_per_row']} tokens, KL (nats) at {text['kl_positions']} positions, "
          f"accuracy on {text['eval_rows']} reviews of at most\n{text['eval_tokens']} tokens, up to {text['decode_tokens']} tokens decoded. "
          "linear: the layers that are quantized, constants counted; load: from disk to the first token;\ntok/s: median of the passes. "
          "nf4-dq, with double quantization, is what the other parts and scripts call nf4; nf4 and fp4 go without it here.")
    print(HEADER, flush=True)


def format_row(row: dict, reference: str) -> str:
    if "reason" in row:
        return f"{row['precision']:16}not measured: {row['reason'][:100]}"
    error = f"{100 * row['weight_error']:.3f}%" if row["weight_error"] else "exact"
    kl = "reference" if row["precision"] == reference else f"{row['kl']:.5f}"
    accuracy = f"{100 * row['accuracy']:.1f}% ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
    decoded = f"{row['decode_tokens_per_second']:.1f}" if row["decode_tokens_per_second"] else "-"
    return (f"{row['precision']:16}{row['bits_model']:8.3f}{row['bits_linear']:8.3f}{row['footprint_bytes'] / 1e6:11.1f}{row['load_seconds']:7.1f}"
            f"{error:>9}{kl:>11}{row['perplexity']:12.2f}  {accuracy:22}{row['prefill_tokens_per_second']:8.0f}{decoded:>8}")


def findings(rows: dict[str, dict], nats: dict[str, np.ndarray], values: int) -> dict:
    """Print and return the order of the 4-bit rows beside the paper's, and what quantization did to memory and speed.

    `nats` holds each row's loss per token of the same text; `values`: see compare.most_values.
    """
    four = [name for name in FOUR_BIT if name in rows]
    order = sorted(four, key=lambda name: rows[name]["perplexity"])
    by_error = sorted(four, key=lambda name: rows[name]["weight_error"])
    found: dict = {"order": order, "order_by_weight_error": by_error, "paired": [], "values_in_32_neighbours": values}
    if len(order) > 1:
        print("\n4-bit rows by perplexity:   " + " < ".join(f"{name} {rows[name]['perplexity']:.2f}" for name in order)
              + "\n           by weight error: " + " < ".join(f"{name} {100 * rows[name]['weight_error']:.2f}%" for name in by_error)
              + ("" if order == by_error else "   (another order)"))
    for better, worse in zip(order, order[1:]):
        found["paired"].append({"better": better, "worse": worse, **paired(nats[worse] - nats[better])})
        print("  {worse} costs {nats:.4f} nats per token more than {better}, 95% interval {low:.4f} to {high:.4f}".format(**found["paired"][-1])
              + (": could be chance" if found["paired"][-1]["low"] < 0 else ""))
    published = [name for name in PAPER if name in rows]
    if len(published) > 1:
        found["agrees_with_paper"] = [name for name in order if name in PAPER] == published
        print("  QLoRA paper, table 2: " + " < ".join(f"{name.removeprefix('torchao-')} {PAPER[name]}" for name in published)
              + f": {'the same order' if found['agrees_with_paper'] else 'not the order measured here'}")
    if order:
        print(f"  the weights on disk take at most {values} different values in 32 neighbours: "
              + ("they were 4-bit blocks on an even grid before,\n  which flatters an even grid (int4)" if values <= 16
                 else "they were not in 4 bits before"))
    small = next((name for name in ("nf4-dq", "nf4", "fp4") if name in rows), None)
    plain = next((name for name in ("bf16", "fp16", "fp32") if name in rows), None)
    if small and plain:
        steady = all(rows[name].get("decode_is_steady") for name in (small, plain))
        found["against"] = {"precision": small, "other": plain, "steady": steady, **ratios(rows[small], rows[plain])}
        print_ratios(found["against"])
    return found


def paired(excess: np.ndarray) -> dict:
    """Mean of the differences on the same tokens and its 95% interval (tokens taken as independent)."""
    mean, half = float(excess.mean()), float(1.96 * excess.std(ddof=1) / math.sqrt(len(excess)))
    return {"nats": mean, "low": mean - half, "high": mean + half}


def ratios(row: dict, other: dict) -> dict:
    """Bytes and rates of one row as multiples of another's; None where a rate is missing."""
    keys = {"footprint": "footprint_bytes", "prefill": "prefill_tokens_per_second", "decode": "decode_tokens_per_second"}
    return {short: row[key] / other[key] if row[key] and other[key] else None for short, key in keys.items()}


def print_ratios(found: dict) -> None:
    if found["decode"] is None:
        return
    slower, faster = max(found["prefill"], found["decode"]) < 1, min(found["prefill"], found["decode"]) > 1
    gain = "memory, not speed" if slower else "memory and speed" if faster else "memory, and speed in part"
    verdict = (f"Here quantization buys {gain};\n\"QLoRA infers 3x faster\" is {'right' if found['decode'] >= 3 else 'wrong'}." if found["steady"]
               else "Too few tokens\nor too uneven to judge speed by (is the machine busy?): run it again.")
    print("\n{precision} against {other}: footprint x {footprint:.2f}, prefill x {prefill:.2f}, decode x {decode:.2f}. ".format(**found) + verdict)


def draw_sizes(path: Path, rows: list[dict]) -> None:
    """Footprint of each measured row, quantized layers and the rest apart, and its perplexity beside it."""
    rows = [row for row in rows if "reason" not in row][::-1]  # the first row on top
    names, places = [row["precision"] for row in rows], range(len(rows))
    linear, total = (np.array([row[key] for row in rows]) / 1e6 for key in ("linear_bytes", "footprint_bytes"))
    figure, (left, right) = new_axes(8, 1.6 + 0.32 * len(rows), ncols=2, sharey=True)
    left.barh(places, linear, color=COLOURS[0], label="linear layers")
    left.barh(places, total - linear, left=linear, color=COLOURS[1], hatch="//", edgecolor="white", label="embeddings, head, norms")
    for place, size in zip(places, total):
        left.text(size, place, f" {size:.0f}", va="center", fontsize=9)
    left.set(xlabel="footprint, MB", yticks=places, yticklabels=names, xlim=(0, 1.15 * total.max()))
    right.hlines(places, min(row["perplexity"] for row in rows), [row["perplexity"] for row in rows], color="#999999", linewidth=1)
    right.plot([row["perplexity"] for row in rows], places, "o", color=COLOURS[3])
    for place, row in zip(places, rows):
        right.text(row["perplexity"], place, f"  {row['perplexity']:.2f}", va="center", fontsize=9)
    right.set(xlabel="perplexity, held-out IMDB text (lower is better)")
    right.margins(x=0.2)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    save(figure, path)


def draw_errors(path: Path, errors: list[dict], precision: str = "nf4") -> None:
    """Relative error of the weights over the layers, one line per module type; `errors` as compare() returns them per precision."""
    figure, axes = new_axes(8, 4.5)
    for i, module in enumerate(dict.fromkeys(e["module"] for e in errors)):
        mine = [e for e in errors if e["module"] == module]
        marker, style = LINES[i % len(LINES)]
        axes.plot([e["layer"] for e in mine], [100 * e["error"] for e in mine], color=COLOURS[i % len(COLOURS)], marker=marker, linestyle=style,
                  markersize=4, linewidth=1.2, label=module)
    axes.set(xlabel="layer", ylabel=f"relative error of the {precision} weights, % (not from 0)", title="Which layers 4 bits hurt most")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
