"""What a comparison of precisions shows: its table, what the rows say, and its pictures."""

import math
from pathlib import Path

import numpy as np

from qlora.measures import with_interval
from qlora.pictures import COLOURS, new_axes, save
from qlora.tables import table_of

FOUR_BIT = ("fp4", "nf4", "nf4-dq", "torchao-int4wo")
FOUR_BIT += ("gptq", "awq", "int4", "int4-g64", "int4-sym", "int4-sym-g64", "mxfp4", "nvfp4")
# Perplexities in arXiv 2305.14314, table 2.
PAPER = {"nf4-dq": "27.41", "fp4": "29.48 to 31.07", "int4-sym-g64": "34.34"}
COLUMNS = {
    **{"precision": "{precision}", "bits/weight": "{bits_model:.3f}", "in linear": "{bits_linear:.3f}"},
    **{"MB": "{megabytes:.1f}", "load s": "{load_seconds:.1f}", "error": "{error}", "KL": "{divergence}"},
    **{"perplexity": "{perplexity:.2f}", "accuracy": "{interval}"},
    **{"prefill": "{prefill_tokens_per_second:.0f}", "decode": "{decoded}"},
}
STYLES = ("o-", "s--", "^-.", "D:", "v-", "P--", "X-.")


def show_header(title: str, text: dict) -> None:
    print(
        f"{title}; the same held-out IMDB text for all\n"
        f"  perplexity, prefill: {text['rows']} reviews of {text['tokens_per_row']} tokens\n"
        f"  KL: to the reference, in nats, at {text['kl_positions']} positions\n"
        f"  accuracy: zero-shot, {text['eval_rows']} reviews of at most {text['eval_tokens']} tokens, "
        "95% interval\n"
        "  in linear: bits in the layers that are quantized, constants counted; error: of their weights\n"
        "  load: from disk to the first token; prefill, decode: tokens/s, median of the passes, "
        f"at most {text['decode_tokens']} decoded\n"
        "  nf4-dq has double quantization: elsewhere it is called nf4. Here nf4 and fp4 do without."
    )


def show_rows(rows: list[dict], reference: str | None) -> None:
    """The table of the measured rows, and below it why the others have no figures."""
    cells = []
    for row in (row for row in rows if "reason" not in row):
        speed = row["decode_tokens_per_second"]
        shown = {"megabytes": row["footprint_bytes"] / 1e6, "interval": with_interval(row)}
        shown["error"] = f"{row['weight_error']:.3%}" if row["weight_error"] else "exact"
        shown["divergence"] = "reference" if row["precision"] == reference else f"{row['kl']:.5f}"
        cells.append({**row, **shown, "decoded": f"{speed:.1f}" if speed else "-"})
    if cells:
        print(table_of(cells, COLUMNS))
    for row in rows:
        if "calibration_seconds" in row:
            print("  {precision}: calibrated in {calibration_seconds:.0f} s, then loaded".format(**row))
        if "reason" in row:
            print(f"  {row['precision']}: not measured: {row['reason'][:100]}")


def findings(rows: dict[str, dict], nats: dict[str, np.ndarray], values: int) -> dict:
    """Print and return the order of the 4-bit rows, the paper's, and what 4 bits did to memory and speed.

    `nats`: each row's loss per token of the same text; `values`: measures.most_values_in_32 of the weights.
    """
    four = [name for name in FOUR_BIT if name in rows]
    order, by_error = (sorted(four, key=lambda n: rows[n][key]) for key in ("perplexity", "weight_error"))
    found: dict = {"order": order, "order_by_weight_error": by_error, "values_in_32_neighbours": values}
    found["paired"] = []
    if len(order) > 1:
        another = "" if order == by_error else " (another order)"
        print("\n4-bit rows by perplexity: " + " < ".join(f"{n} {rows[n]['perplexity']:.2f}" for n in order))
        print("  by error: " + " < ".join(f"{n} {rows[n]['weight_error']:.2%}" for n in by_error) + another)
    for better, worse in zip(order, order[1:]):
        pair = {"better": better, "worse": worse, **paired(nats[worse] - nats[better])}
        found["paired"].append(pair)
        costs = "  {worse} costs {nats:.4f} nats per token more than {better}".format(**pair)
        chance = ": could be chance" if pair["low"] < 0 else ""
        print(f"{costs}, 95% interval {pair['low']:.4f} to {pair['high']:.4f}{chance}")
    published = [name for name in PAPER if name in rows]
    if len(published) > 1:
        found["agrees_with_paper"] = [name for name in order if name in PAPER] == published
        theirs = " < ".join(f"{name} {PAPER[name]}" for name in published)
        same = "the same order" if found["agrees_with_paper"] else "not the order measured here"
        print(f"  QLoRA paper, table 2: {theirs}: {same}")
    if order:
        grid = "they were 4-bit blocks before,\n  on an even grid, which flatters an even grid (int4)"
        origin = grid if values <= 16 else "they were not in 4 bits before"
        print(f"  the weights on disk have at most {values} different values in 32 neighbours: {origin}")
    return found | against_16_bits(rows)


def paired(excess: np.ndarray) -> dict:
    """Mean of the differences on the same tokens and its 95% interval (tokens taken as independent)."""
    mean, half = float(excess.mean()), float(1.96 * excess.std(ddof=1) / math.sqrt(len(excess)))
    return {"nats": mean, "low": mean - half, "high": mean + half}


def against_16_bits(rows: dict[str, dict]) -> dict:
    """Print and return a 4-bit row's bytes and rates as multiples of a 16-bit row's; {} without such rows."""
    small = next((name for name in ("nf4-dq", "nf4", "fp4") if name in rows), None)
    plain = next((name for name in ("bf16", "fp16", "fp32") if name in rows), None)
    if not (small and plain):
        return {}
    keys = {"footprint": "footprint_bytes"}
    keys |= {speed: f"{speed}_tokens_per_second" for speed in ("prefill", "decode")}
    pairs = {short: (rows[small][key], rows[plain][key]) for short, key in keys.items()}
    ratios = {short: a / b if a and b else None for short, (a, b) in pairs.items()}
    steady = all(rows[name].get("decode_is_steady") for name in (small, plain))
    found = {"precision": small, "other": plain, "steady": steady, **ratios}
    if found["decode"] is not None:
        multiples = "footprint x {footprint:.2f}, prefill x {prefill:.2f}, decode x {decode:.2f}"
        print("\n{precision} against {other}: ".format(**found) + multiples.format(**found))
        print(f"  {verdict(found)}")
    return {"against": found}


def verdict(found: dict) -> str:
    if not found["steady"]:
        return "Too few tokens or too uneven to judge speed by (is the machine busy?): run it again."
    slow, fast = sorted((found["prefill"], found["decode"]))
    mixed = "memory and speed" if slow > 1 else "memory, and speed in part"
    gain = "memory, not speed" if fast < 1 else mixed
    right = "right" if found["decode"] >= 3 else "wrong"
    return f'Here quantization buys {gain}; "QLoRA infers 3x faster" is {right}.'


def draw_sizes(path: Path, rows: list[dict]) -> None:
    """Footprint of each measured row, quantized layers and the rest apart, and its perplexity beside it."""
    rows = [row for row in rows if "reason" not in row][::-1]  # the first row on top
    places, names = range(len(rows)), [row["precision"] for row in rows]
    perplexity = np.array([row["perplexity"] for row in rows])
    linear = np.array([row["linear_bytes"] for row in rows]) / 1e6
    total = np.array([row["footprint_bytes"] for row in rows]) / 1e6
    figure, (left, right) = new_axes(8, 1.6 + 0.32 * len(rows), ncols=2, sharey=True)
    left.barh(places, linear, color=COLOURS[0], label="linear layers")
    rest = {"hatch": "//", "edgecolor": "white", "label": "embeddings, head, norms"}
    left.barh(places, total - linear, left=linear, color=COLOURS[1], **rest)
    right.hlines(places, perplexity.min(), perplexity, color="#999999", linewidth=1)
    right.plot(perplexity, places, "o", color=COLOURS[3])
    for place, size, value in zip(places, total, perplexity):
        left.text(size, place, f" {size:.0f}", va="center", fontsize=9)
        right.text(value, place, f"  {value:.2f}", va="center", fontsize=9)
    left.set(xlabel="footprint, MB", yticks=places, yticklabels=names, xlim=(0, 1.15 * total.max()))
    right.set(xlabel="perplexity, held-out IMDB text (lower is better)")
    right.margins(x=0.2)
    left.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    save(figure, path)


def draw_errors(path: Path, errors: dict[str, list[dict]]) -> None:
    """A 4-bit type's relative error over the layers, a line per module type; `errors` as in compare()."""
    precision = next(p for p in ("nf4-dq", "nf4", *FOUR_BIT) if p in errors)
    errors = errors[precision]
    figure, axes = new_axes(8, 4.5)
    for i, module in enumerate(dict.fromkeys(e["module"] for e in errors)):
        layers, percents = zip(*((e["layer"], 100 * e["error"]) for e in errors if e["module"] == module))
        style, colour = STYLES[i % len(STYLES)], COLOURS[i % len(COLOURS)]
        axes.plot(layers, percents, style, color=colour, markersize=4, linewidth=1.2, label=module)
    axes.set(xlabel="layer", ylabel=f"relative error of the {precision} weights, % (not from 0)")
    axes.set_title("Which layers 4 bits hurt most")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)
