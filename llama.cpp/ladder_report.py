"""The parity ladder as files: parity.json, a table, a picture."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from matplotlib.ticker import NullFormatter

from ladder import can_judge
from llama_server import TOP
from qlora.adapters import Adapter
from qlora.cli import UserError, note
from qlora.files import write_json, write_text
from qlora.hardware import detect, environment
from qlora.measures import percent, with_interval
from qlora.pictures import COLOURS, new_axes, save
from qlora.tables import markdown_table, table
from reference import Questions
from settings import LLAMA_CPP_TAG, PROVED

KEY = """\
agreement: the same label as the trained model; sure flips: other labels that rounding can't explain;
survival: share of what training changed that is left, with its 95% interval; Δ log-odds: change of
log P(answer 2) - log P(answer 1); noise: as much of its rms as rounding explains; KL: nats from the trained
model's next-token distribution after a review, free KL: after a free prompt; free text: share of its text
before the first difference. The first two rows are transformers, the others llama-server."""

COLUMNS = {
    "file": lambda r: f"{r['name']} ({r['dtype']})" if "dtype" in r else r["name"],
    "MB": lambda r: f"{r['bytes'] / 1e6:.0f}",
    "bits/weight": lambda r: f"{r['bits_per_weight']:.2f}",
    "same ids": lambda r: "yes" if r["prompt_ids_equal"] else "NO",
    "agreement": lambda r: percent(r["agreement"]),
    "sure flips": lambda r: str(r["sure"]["disagreements"]),
    "survival": lambda r: share_left(r["survival"]),
    "accuracy (95% interval)": lambda r: with_interval(r["accuracy"]),
    "Δ log-odds rms, max": lambda r: "{rms:.3f}, {max:.2f}".format(**r["log_odds_shift"]),
    "noise": lambda r: f"{r['rounding']['noise']:.3f}",
    "KL mean, max": lambda r: "{mean:.2g}, {max:.2g}".format(**r["kl"]),
    "free KL": lambda r: f"{r['free']['kl_mean']:.4f}",
    "free text": lambda r: percent(r["free"]["same_text"]),
    "prefill tok/s": lambda r: f"{r['prefill_tokens_per_second']:.0f}",
    "decode tok/s": lambda r: f"{r['decode_tokens_per_second']:.1f}",
    "load s": lambda r: "" if r["load_seconds"] is None else f"{r['load_seconds']:.1f}",
    "bound": lambda r: "broken" if r["broken"] else "ok" if can_judge(r) else "ok, survival not judged",
}


def share_left(survival: dict) -> str:
    return "{:.0%} ({:.0f} to {:.0f})".format(
        survival["share"], 100 * survival["low"], 100 * survival["high"]
    )


def write_record(path: Path, adapter: Adapter, questions: Questions, results: list[dict]) -> None:
    """parity.json; without the base's public name, which may be a path of this machine."""
    record = {
        "environment": environment(detect(adapter.base.precision)),
        "llama_cpp": {"tag": LLAMA_CPP_TAG, "built": PROVED.read_text().splitlines()[1]},
        "adapter": adapter.name,
        "base": {key: value for key, value in asdict(adapter.base).items() if key != "public_name"},
        "rows": len(questions.truth),
        "free_prompts": len(questions.free),
        "free_tokens": questions.free_tokens,
        "top": TOP,
        "rungs": results,
    }
    write_json(path, record)


def show(path: Path, results: list[dict]) -> None:
    """Table on stdout; Markdown and picture beside `path`; raises UserError with what is broken."""
    rows = [[cell(figure, r) for figure in COLUMNS.values()] for r in results]
    rows[0][-1] = ""  # the trained model is what the others are held to
    print(table(list(COLUMNS), rows, indent=0))
    note(KEY)
    if results[0]["accuracy"]["rows"] < 100:
        note(
            "note       fewer than 100 rows: 2 more than the bound allows may differ; only large faults show"
        )
    for r in results[1:]:
        if r.get("rounding") and not can_judge(r):
            noise = "all that training changed ({effect:.2g}) is within this form's rounding ({noise:.2g})"
            note(f"note       {r['name']}: {noise.format(**r['rounding'])}: survival can't be judged")
    broken = [(r["name"], "; ".join(r["broken"]), r["cause"]) for r in results if r["broken"]]
    text = [KEY, "", markdown_table(list(COLUMNS), rows), *(["", "Broken:", ""] if broken else [])]
    text += [f"- {name}: {what}{f' (likely: {why})' if why else ''}" for name, what, why in broken]
    write_text(path.with_suffix(".md"), "\n".join(text) + "\n")
    draw(path.with_suffix(".png"), results)
    note(f"written    {path.parent}/: {path.name}, {path.stem}.md, {path.stem}.png")
    if broken:
        causes = " | ".join(f"{name}: {why or what}" for name, what, why in broken)
        raise UserError(f"{len(broken)} of {len(results)} rows broken: {causes}")


def cell(figure: Callable, r: dict) -> str:
    """A figure as text; empty where there is none: transformers' rows have no bytes, a broken file no KL,
    files of an unknown type no survival."""
    try:
        return figure(r)
    except (KeyError, TypeError):
        return ""


def draw(path: Path, results: list[dict]) -> None:
    """Size, accuracy, survival, distance from the trained model (dashed) and decoding speed of each file."""
    trained, files = results[0], [r for r in results if "bytes" in r and "kl" in r]
    files.sort(key=lambda r: -r["bytes"])
    height = 1.4 + 0.4 * max(len(files), 3)
    figure, (size, right, left, distance, speed) = new_axes(width=13, height=height, ncols=5, sharey=True)
    for y, r in enumerate(files):
        colour = COLOURS[3] if r["kind"] == "lora" else COLOURS[0]
        size.barh(y, r["bytes"] / 1e6, color=colour)
        for axes, shown, key in ((right, r["accuracy"], "accuracy"), (left, r["survival"], "share")):
            if shown:
                value, low, high = (100 * shown[name] for name in (key, "low", "high"))
                bar = [[value - low], [high - value]]
                axes.errorbar([value], [y], xerr=bar, fmt="o", color=colour, capsize=3)
        distance.plot([max(r["kl"]["mean"], 1e-6)], [y], "o", color=colour)
        speed.barh(y, r["decode_tokens_per_second"], color=colour)
    dashed = {"color": COLOURS[6], "linestyle": "--", "linewidth": 1}
    right.axvline(100 * trained["accuracy"]["accuracy"], **dashed)
    left.axvline(100, **dashed)
    speed.axvline(trained["decode_tokens_per_second"], **dashed)
    distance.set_xscale("log")
    low, high = map(math.log10, distance.get_xlim())
    distance.set_xlim(10 ** math.floor(low), 10 ** math.ceil(high))  # whole decades: those have labels
    distance.xaxis.set_minor_formatter(NullFormatter())
    names = [r["name"] + (" (broken)" if r["broken"] else "") for r in files]
    size.set(yticks=range(len(files)), yticklabels=names, xlabel="size, MB")
    right.set(xlabel=f"accuracy, %\n({trained['accuracy']['rows']} reviews, 95% interval)")
    left.set(xlabel="left of what training\nchanged, % (95% interval)")
    distance.set(xlabel=f"mean KL from\n{trained['name']}, nats")
    speed.set(xlabel=f"decoding, tokens/s\n(dashed: {trained['name']}\nin transformers)")
    save(figure, path)
