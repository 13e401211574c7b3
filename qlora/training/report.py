"""report.json is the record of what a run measured; report.md, curves.png and the model card come from it."""

import itertools
from pathlib import Path

from config import PRECISIONS
from qlora import processes
from qlora.cards import PEFT, front_matter, short, short_all
from qlora.cli import note
from qlora.files import write_json, write_text
from qlora.hardware import peak_memory_bytes
from qlora.logits import IGNORE
from qlora.measures import percent, with_interval
from qlora.pictures import COLOURS, new_axes, save
from qlora.sources import HUB_GGUF
from qlora.tables import markdown_table, table
from qlora.training import forgetting
from qlora.weights import trainable_and_all

COLUMNS = {
    "base_zero_shot": "base, zero-shot",
    "base_few_shot": "base, {examples} examples",
    "bag_of_words": "bag of words",
    "initial": "initial adapter",
    "tuned": "tuned (this adapter)",
}
HEADERS = ("", "accuracy", "95% interval")
PAIR_COLUMNS = {
    "before": "before: log P(chosen) > log P(rejected)",
    "after": "after: log P(chosen) > log P(rejected)",
    "reward": "after: implicit reward of chosen higher",
}


def data_section(found, train: list[dict], eval_rows: int) -> dict:
    return {
        "origin": found.origin,
        "train_rows": len(train) // (2 if found.kind == "pairs" else 1),
        "eval_rows": eval_rows,
        "train_tokens": sum(len(e["input_ids"]) for e in train),
        "supervised_tokens": sum(label != IGNORE for e in train for label in e["labels"][1:]),
        "duplicates_removed": found.duplicates_removed,
    }


def settings_section(settings) -> dict:
    """Numbers as they are, all else as text: ("a.csv", "b.csv") -> 'a.csv b.csv'"""
    words = lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else str(v)
    return {k: v if isinstance(v, (int, float, type(None))) else words(v) for k, v in vars(settings).items()}


def lora_section(model) -> dict:
    """Parameters by PEFT's own count; bytes of the adapters as they are trained."""
    trainable, total = trainable_and_all(model)
    counts = {"trainable_parameters": trainable, "all_parameters": total, "percent": 100 * trainable / total}
    return {**counts, "bytes": sum(p.nbytes for p in model.parameters() if p.requires_grad)}


def memory_section(device: str, measured: dict, predicted: dict | None, weights_bytes: int) -> dict:
    """Peak of training's tensors, predicted and measured, and of all that the process ever held."""
    cpu = device == "cpu"
    return {
        "predicted_peak_bytes": predicted and predicted["peak"],
        "measured_peak_bytes": measured["peak_bytes"] or None,
        "what": "live tensors in the widest training step" if cpu else "CUDA allocator, while training",
        "predicted": predicted,
        "process_peak_bytes": max(measured["process_peak_bytes"], peak_memory_bytes(device)),
        "weights_bytes": weights_bytes,
    }


def train_section(measured: dict, history: list[dict]) -> dict:
    """Of the whole run, but for what a killed process did after its last checkpoint."""
    losses = [h["loss"] for h in history] or [float("nan")]
    few = max(1, min(10, len(losses) // 2))  # steps at either end, none of them at both
    return {
        "steps": len(history),
        **{key: measured[key] for key in ("processes", "seconds", "real_tokens", "applied_updates")},
        "world_size": processes.count(),
        "tokens_per_second": measured["real_tokens"] / measured["seconds"],
        "loss_first": sum(losses[:few]) / few,
        "loss_last": sum(losses[-few:]) / few,
    }


def accuracy_rows(evaluation: dict, columns: dict = COLUMNS) -> list[tuple[str, str, str]]:
    """[(who, accuracy, 95% interval)] in the order of `columns`."""
    rows = []
    for key, title in columns.items():
        if r := evaluation.get(key):
            interval = f"{percent(r['low'])} to {percent(r['high'])}"
            rows.append((title.format(**r), percent(r["accuracy"]), interval))
    return rows


def train_line(train: dict) -> str:
    loss, speed = f"{train['loss_first']:.2f} -> {train['loss_last']:.2f}", train["tokens_per_second"]
    return f"{train['steps']} steps, {train['seconds']:.0f} s, {speed:.0f} real tokens/s, loss {loss}"


def scoring_line(during: dict) -> str:
    """'lowest at step 30 of 45: 0.412, accuracy 81.2%; stopped early; what is saved is step 30'"""
    by_step = {point["step"]: point for point in during["points"]}
    best, last = during["best_step"], during["last_step"]
    parts = [f"lowest at step {best} of {last}: {held_out_score(by_step[best])}"] if best else []
    if best != last:
        parts.append(f"{held_out_score(by_step[last])} at the last")
    parts += ["stopped early"] * during["stopped_early"]
    return "; ".join([*parts, f"what is saved is step {during['saved_step']}"])


def held_out_score(point: dict) -> str:
    """'0.412, accuracy 81.2%'"""
    right = f", accuracy {percent(point['accuracy'])}" if "accuracy" in point else ""
    return f"{point['loss']:.3f}{right}"


def memory_line(memory: dict) -> str:
    """'peak memory 1.07 GB in a training step (predicted 1.07, off by 0.1%), 2.62 GB of the process'"""
    measured, predicted = memory["measured_peak_bytes"], memory["predicted_peak_bytes"]
    parts = [f"{measured / 1e9:.2f} GB in a training step"] if measured else []
    if measured and predicted:
        error = abs(100 * (predicted / measured - 1))
        parts[0] += f" (predicted {predicted / 1e9:.2f}, off by {error:.1f}%)"
    parts.append(f"{memory['process_peak_bytes'] / 1e9:.2f} GB of the process")
    return f"peak memory {', '.join(parts)}"


def perplexity_line(evaluation: dict) -> str:
    before, after = evaluation["perplexity"]["before"], evaluation["perplexity"]["after"]
    change = f"{before['perplexity']:.2f} before, {after['perplexity']:.2f} after"
    return f"perplexity on {evaluation['rows']} held-out rows ({before['tokens']} tokens): {change}"


def pairs_lines(evaluation: dict) -> list[str]:
    """Two sentences on held-out pairs: what they are, and by how much replies are preferred."""
    pairs, prompts = evaluation["pairs"], evaluation["prompts"]
    then, now, reward = (pairs[key]["mean_margin"] for key in ("before", "after", "reward"))
    shorter = f"in {percent(pairs['shorter_chosen'])} of them the chosen reply is the shorter one"
    return [
        f"{evaluation['rows']} held-out pairs ({prompts} prompts, none of them trained on); {shorter}.",
        f"Mean of log P(chosen) - log P(rejected): {then:.1f} nats before, {now:.1f} after; "
        f"implicit reward (beta {pairs['beta']:g}): {reward:+.2f}, loss {pairs['loss']:.3f} (log 2 = 0.693).",
    ]


def show_result(report: dict) -> None:
    """The result on stdout, what it cost on stderr."""
    evaluation = report["evaluation"]
    note(f"training   {train_line(report['train'])}\n           {memory_line(report['memory'])}\n")
    if during := report["during_training"]:
        note(f"held out   loss of {during['rows']} rows {scoring_line(during)}\n")
    forgotten = f"  {forgetting.summary(report['forgetting'])}"
    if "pairs" in evaluation:
        first, second = pairs_lines(evaluation)
        rows = accuracy_rows(evaluation["pairs"], PAIR_COLUMNS)
        print(first, table(HEADERS, rows), second, forgotten, sep="\n")
        return
    if "tuned" not in evaluation:
        print(perplexity_line(evaluation), forgotten, sep="\n")
        return
    flips = evaluation["flips"]
    print(f"the same {evaluation['rows']} held-out rows, before and after")
    print(table(HEADERS, accuracy_rows(evaluation)))
    shown = "; for example" if flips["examples"] else ""
    print(f"  {flips['fixed']} rows fixed, {flips['broken']} broken{shown}")
    for each in flips["examples"]:
        change = f"{each['before']} -> {each['after']} (truth {each['truth']})"
        print(f"  {each['kind']}: {change}: … {each['text'][-160:]}")
    print(forgotten)


def write_report(out: Path, report: dict, history: list[dict]) -> None:
    """Write report.json, report.md, curves.png and the model card into `out`."""
    draw_curves(out / "curves.png", history, report)
    text = markdown(report)
    write_text(out / "report.md", text)
    write_text(out / "README.md", model_card(report, text))
    write_json(out / "report.json", report)  # last: its presence says that the run is complete


def markdown(report: dict) -> str:
    env, data, memory, lora = (report[k] for k in ("environment", "data", "memory", "lora"))
    evaluation, guards = report["evaluation"], [g["name"] for g in report["guards"] if g["passed"]]
    versions = ", ".join(f"{name} {env[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    counts = f"{lora['trainable_parameters']:,} of {lora['all_parameters']:,} ({lora['percent']:.2f}%)"
    facts = [
        (
            f"training {'pairs' if 'pairs' in evaluation else 'rows'}, tokens",
            f"{data['train_rows']}, {data['train_tokens']}",
        ),
        ("supervised tokens", data["supervised_tokens"]),
        ("duplicates removed before the split", data["duplicates_removed"]),
        ("trainable parameters", f"{counts}, {lora['bytes'] / 1e6:.1f} MB"),
        ("training (loss: first and last steps, ten at most)", train_line(report["train"])),
        ("memory", f"weights {memory['weights_bytes'] / 1e9:.2f} GB, {memory_line(memory)}"),
        ("guards that held", f"{len(guards)}: {', '.join(guards)}"),
    ]
    if during := report["during_training"]:
        rows = f"held-out loss while training ({during['rows']} rows, every {during['every']} steps)"
        facts.insert(5, (rows, f"{scoring_line(during)}; {during['seconds']:.0f} s of scoring"))
    if "pairs" in evaluation:
        first, second = pairs_lines(evaluation)
        scores = [first, markdown_table(HEADERS, accuracy_rows(evaluation["pairs"], PAIR_COLUMNS)), second]
    else:
        scores = accuracy_parts(evaluation) if "tuned" in evaluation else [perplexity_line(evaluation) + "."]
    scores += forgetting.markdown_parts(report["forgetting"])
    title = f"# {short(report['base']['name'])} + LoRA on {short_all(report['settings']['dataset'])}"
    machine = f"Run {report['name']}: {env['device_name']}, {env['dtype']} ({env['why']}); {versions}."
    if grid := report["settings"].get("qat"):
        through = f"every merged weight W + s B A went through its grid (`--qat {grid}`)"
        machine += f" Trained for {grid}: {through}; PEFT alone computes without it."
    if (initial := report["settings"].get("init_adapter")) not in (None, "None"):
        machine += f" Went on from the adapter `{initial}`."
    return "\n\n".join([title, machine, *scores, markdown_table(("", ""), facts), "![loss](curves.png)\n"])


def accuracy_parts(evaluation: dict) -> list[str]:
    """Markdown: the table of scores, the confusion of the tuned model, examples of flips."""
    flips, counts = evaluation["flips"], evaluation["tuned"]["confusion"]
    confusion = [[truth, *row.values()] for truth, row in counts.items()]
    parts = [f"On the same {evaluation['rows']} held-out rows:"]
    parts.append(markdown_table(HEADERS, accuracy_rows(evaluation)))
    if others := evaluation.get("tuned_on_others"):
        chose = evaluation["rows"] - others["rows"]
        parts.append(f"{chose} of these rows chose the step; on the others: {with_interval(others)}.")
    parts.append(f"Training fixed {flips['fixed']} rows and broke {flips['broken']}.")
    parts.append(markdown_table(("truth \\ tuned says", *counts), confusion))
    for each in flips["examples"]:
        change = f"truth {each['truth']}, before {each['before']}, after {each['after']}"
        parts.append(f"- {each['kind']}: {change}  \n  > {each['text']}")
    return parts


def model_card(report: dict, text: str) -> str:
    base, scores = report["base"], report["evaluation"]
    scores = scores if "tuned" in scores else None
    file = HUB_GGUF.fullmatch(base["public_name"])  # the hub wants the repository's name
    name = file[1] if file else base["public_name"]
    return f"""{front_matter(name, report["settings"]["dataset"], scores, **PEFT)}
{text}
## Use

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

{loading_snippet(base)}
model = PeftModel.from_pretrained(base, "this-folder")
```

Trained on the base at {base["precision"]} ({base["dtype"]}), revision {base["revision"] or "(local folder)"}:
on another precision or revision its answers can differ. qlora.json holds the prompt that it was trained with;
another prompt gives other answers.
"""


def loading_snippet(base: dict) -> str:
    """Python that loads the base at the precision that it was trained at."""
    source, revision, quantization = base["public_name"], base["revision"], PRECISIONS[base["precision"]]
    from_gguf = source.lower().endswith(".gguf")
    options, remark = [f"dtype=torch.{base['dtype']}"], ""
    if isinstance(quantization, dict) and from_gguf:
        precision = base["precision"]
        remark = f"# Trained at {precision}; transformers can't quantize a GGUF file: near, not the same.\n"
    elif isinstance(quantization, dict):
        given = [f"{key}={value!r}" for key, value in quantization.items()]
        given += [f"bnb_4bit_compute_dtype=torch.{base['dtype']}"] if "load_in_4bit" in quantization else []
        options.append(f"quantization_config=BitsAndBytesConfig({', '.join(given)})")
    elif quantization is None:
        remark = (
            f"# Quantized by {base['precision'].upper()}: transformers needs the package gptqmodel for it.\n"
        )
    if revision and ":" not in revision:  # a commit
        options.append(f'revision="{revision}"')
    if from_gguf:
        file = HUB_GGUF.fullmatch(source)
        source, name = file.groups() if file else (Path(source).parent, Path(source).name)
        options.append(f'gguf_file="{name}"')
    elif revision.startswith("gguf"):
        remark = "# Trained on a GGUF file of this model: its weights are near the hub's, not the same.\n"
    return f'{remark}base = AutoModelForCausalLM.from_pretrained("{source}", {", ".join(options)})'


def draw_curves(path: Path, history: list[dict], report: dict) -> None:
    """Loss (raw and smoothed, and of held-out rows) and gradient norm over the optimizer steps."""
    steps, losses = [h["step"] for h in history], [h["loss"] for h in history]
    smooth = list(itertools.accumulate(losses, lambda mean, loss: 0.9 * mean + 0.1 * loss))
    figure, (left, right) = new_axes(10, 3.6, ncols=2)
    left.plot(steps, losses, color="#bbbbbb", linewidth=0.8, label="each step")
    left.plot(steps, smooth, color=COLOURS[0], linewidth=2, label="smoothed (0.9)")
    if during := report["during_training"]:
        draw_held_out(left, during)
    # The first steps learn the answer's form, at ten times the loss of what follows: a log scale.
    unit = "nats per supervised token"
    if "pairs" in report["evaluation"]:
        left.axhline(0.6931, color=COLOURS[1], linewidth=0.8, label="log 2: as the reference")
        unit = "DPO's loss per pair"
    left.set(title="loss" if during else "training loss", xlabel="step", ylabel=unit, yscale="log")
    left.legend(frameon=False)
    right.plot(steps, [h.get("grad_norm", float("nan")) for h in history], color=COLOURS[3], linewidth=1)
    right.set(title="gradient norm before clipping", xlabel="step", ylabel="all LoRA matrices", yscale="log")
    what = f"{short(report['base']['name'])} on {short_all(report['settings']['dataset'])}"
    figure.suptitle(f"{what}: {report['train']['steps']} steps", fontsize=10)
    save(figure, path)


def draw_held_out(axes, during: dict) -> None:
    """The loss of the held-out rows that were scored while the run trained, and which step is saved."""
    steps, losses = zip(*((point["step"], point["loss"]) for point in during["points"]))
    style = {"color": COLOURS[1], "marker": "o", "markersize": 4, "linewidth": 1.5}
    axes.plot(steps, losses, label=f"{during['rows']} held-out rows", **style)
    saved = during["saved_step"]
    axes.axvline(saved, color=COLOURS[6], linestyle=":", linewidth=1, label=f"saved: step {saved}")
