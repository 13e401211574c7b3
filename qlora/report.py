"""report.json is the record; report.md, curves.png and the model card are made from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from qlora.cli import note
from qlora.hardware import environment, peak_memory_bytes
from qlora.prompts import IGNORE
from qlora.runs import write_json

COLUMNS = {
    "base_zero_shot": "base, zero-shot",
    "base_few_shot": "base, {examples} examples",
    "bag_of_words": "bag of words",
    "tuned": "tuned (this adapter)",
}


def percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def accuracy_table(evaluation: dict) -> list[tuple[str, str, str]]:
    """[(who, accuracy, 95% interval)] in the order of COLUMNS."""
    return [
        (title.format(**r), percent(r["accuracy"]), f"{percent(r['low'])} to {percent(r['high'])}")
        for key, title in COLUMNS.items()
        if (r := evaluation.get(key))
    ]


def build_report(settings, hardware, base, model, found, train, guards, measured, history, evaluation, predicted, seconds) -> dict:
    """All that report.json holds; every figure is a measurement of this run."""
    trainable, total = model.get_nb_trainable_parameters()
    adapter_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    losses = [h["loss"] for h in history] or [float("nan")]
    few = max(1, min(10, len(losses) // 2))  # steps at either end, none of them at both
    return {
        "environment": environment(hardware),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()},
        "base": dataclasses.asdict(base.info),
        "data": {
            "origin": found.origin,
            "train_rows": len(train),
            "eval_rows": evaluation["rows"],
            "train_tokens": sum(len(e["input_ids"]) for e in train),
            "supervised_tokens": sum(label != IGNORE for e in train for label in e["labels"][1:]),
            "duplicates_removed": found.duplicates_removed,
        },
        "lora": {"trainable_parameters": trainable, "all_parameters": total, "percent": 100 * trainable / total,
                 "bytes": adapter_bytes},
        "memory": memory(hardware, measured, predicted, base.model.get_memory_footprint() - adapter_bytes),
        # Of the whole run, but for what a killed process did after its last checkpoint.
        "train": {"steps": len(history), "processes": measured["processes"], "seconds": measured["seconds"], "real_tokens": measured["real_tokens"],
                  "tokens_per_second": measured["real_tokens"] / measured["seconds"],
                  "loss_first": sum(losses[:few]) / few, "loss_last": sum(losses[-few:]) / few},
        "evaluation": evaluation,
        "guards": guards.results,
        "seconds": seconds,
    }


def memory(hardware, measured: dict, predicted: dict | None, weights_bytes: int) -> dict:
    """Peak of training's tensors, predicted and measured, and of all that the process ever held."""
    return {"predicted_peak_bytes": predicted and predicted["peak"], "measured_peak_bytes": measured["peak_bytes"] or None,
            "what": "live tensors in the widest training step" if hardware.device == "cpu" else "CUDA allocator, while training",
            "predicted": predicted, "process_peak_bytes": max(measured["process_peak_bytes"], peak_memory_bytes(hardware.device)), "weights_bytes": weights_bytes}


def memory_line(memory: dict) -> str:
    """'peak memory 1.07 GB in a training step (predicted 1.07, off by 0.1%), 2.62 GB of the process'"""
    measured, predicted = memory["measured_peak_bytes"], memory["predicted_peak_bytes"]
    parts = [f"{memory['process_peak_bytes'] / 1e9:.2f} GB of the process"]
    if measured:
        compared = f" (predicted {predicted / 1e9:.2f}, off by {abs(100 * (predicted / measured - 1)):.1f}%)" if predicted else ""
        parts.insert(0, f"{measured / 1e9:.2f} GB in a training step{compared}")
    return "peak memory " + ", ".join(parts)


def show_result(report: dict) -> None:
    """The result on stdout, what it cost on stderr."""
    train, memory, evaluation = report["train"], report["memory"], report["evaluation"]
    note(f"training   {train['steps']} steps, {train['seconds']:.0f} s, {train['tokens_per_second']:.0f} real tokens/s, "
         f"loss {train['loss_first']:.2f} -> {train['loss_last']:.2f}\n           {memory_line(memory)}\n")
    if "tuned" not in evaluation:
        p = evaluation["perplexity"]
        print(f"perplexity on {evaluation['rows']} held-out rows: {p['before']['perplexity']:.2f} before, {p['after']['perplexity']:.2f} after")
        return
    print(f"accuracy on the same {evaluation['rows']} held-out rows, with 95% interval")
    for who, accuracy, interval in accuracy_table(evaluation):
        print(f"  {who:22} {accuracy:>6}   {interval}")
    flips = evaluation["flips"]
    print(f"  {flips['fixed']} rows put right, {flips['broken']} broken; for example")
    for example in flips["examples"]:
        print(f"  {example['kind']}: {example['before']} -> {example['after']} (truth {example['truth']}): … {example['text'][-160:]}")


def write_report(out: Path, report: dict, history: list[dict]) -> None:
    """Write report.json, report.md, curves.png and the model card into `out`."""
    draw_curves(out / "curves.png", history, report)
    text = markdown(report)
    (out / "report.md").write_text(text)
    (out / "README.md").write_text(model_card(report, text))
    write_json(out / "report.json", report)  # last: its presence says that the run is complete


def markdown(report: dict) -> str:
    env, data, train, memory, lora = (report[k] for k in ("environment", "data", "train", "memory", "lora"))
    evaluation = report["evaluation"]
    lines = [
        f"# {report['base']['name']} + LoRA on {report['settings']['dataset']}",
        "",
        f"{env['device_name']}, {env['dtype']} ({env['why']}); torch {env['torch']}, transformers {env['transformers']}, "
        f"peft {env['peft']}, bitsandbytes {env['bitsandbytes']}.",
        "",
    ]
    if "tuned" in evaluation:
        lines += [f"On the same {evaluation['rows']} held-out rows:", "", "| | accuracy | 95% interval |", "|---|---|---|"]
        lines += [f"| {who} | {accuracy} | {interval} |" for who, accuracy, interval in accuracy_table(evaluation)]
        flips = evaluation["flips"]
        lines += ["", f"Training put {flips['fixed']} rows right and broke {flips['broken']}.", "", confusion(evaluation["tuned"])]
        for example in flips["examples"]:
            lines += ["", f"- {example['kind']}: truth {example['truth']}, before {example['before']}, after {example['after']}  ", f"  > {example['text']}"]
    if "perplexity" in evaluation:
        before, after = evaluation["perplexity"]["before"], evaluation["perplexity"]["after"]
        lines += [f"Perplexity on {evaluation['rows']} held-out rows ({before['tokens']} tokens): {before['perplexity']:.2f} before, {after['perplexity']:.2f} after."]
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| training rows, tokens, supervised tokens | {data['train_rows']}, {data['train_tokens']}, {data['supervised_tokens']} |",
        f"| duplicates removed before the split | {data['duplicates_removed']} |",
        f"| trainable parameters | {lora['trainable_parameters']:,} of {lora['all_parameters']:,} ({lora['percent']:.2f}%), {lora['bytes'] / 1e6:.1f} MB |",
        f"| steps, seconds, real tokens/s | {train['steps']}, {train['seconds']:.0f}, {train['tokens_per_second']:.0f} |",
        f"| loss, first and last steps (ten at most) | {train['loss_first']:.3f}, {train['loss_last']:.3f} |",
        f"| memory | weights {memory['weights_bytes'] / 1e9:.2f} GB, {memory_line(memory)} |",
        f"| guards | {sum(x['passed'] for x in report['guards'])} of {len(report['guards'])} held |",
        "",
        "![loss](curves.png)",
        "",
    ]
    return "\n".join(lines)


def confusion(result: dict) -> str:
    counts = result["confusion"]
    names = list(counts)
    rows = ["| truth \\ tuned says | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    return "\n".join(rows + [f"| {name} | " + " | ".join(str(counts[name][n]) for n in names) + " |" for name in names])


def model_card(report: dict, text: str) -> str:
    base = report["base"]
    head = ["---", f"base_model: {base['public_name']}", "library_name: peft", "tags: [qlora, lora]", "---", ""]
    use = [
        "## Use",
        "",
        "```python",
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, BitsAndBytesConfig",
        "",
        *loading_snippet(base),
        'model = PeftModel.from_pretrained(base, "this-folder")',
        "```",
        "",
        f"Trained on the base at {base['precision']} ({base['dtype']}), revision {base['revision'] or 'of a local folder'}; on another precision or "
        "revision its answers can differ. qlora.json holds the prompt that it was trained with; another prompt gives other answers.",
        "",
    ]
    return "\n".join(head) + text + "\n".join(use)


def loading_snippet(base: dict) -> list[str]:
    """Python that loads the base at the precision that it was trained at."""
    options = [f"dtype=torch.{base['dtype']}"]
    source, lines, from_gguf = base["public_name"], [], base["public_name"].lower().endswith(".gguf")
    if from_gguf and base["precision"] in ("nf4", "fp4", "int8"):
        lines = [f"# Trained at {base['precision']}; transformers can't quantize what it reads from a GGUF file (qlora_inference.py can), so this is near, not the same."]
    elif base["precision"] in ("nf4", "fp4"):
        options.append(f'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="{base["precision"]}", '
                       f"bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.{base['dtype']})")
    elif base["precision"] == "int8":
        options.append("quantization_config=BitsAndBytesConfig(load_in_8bit=True)")
    if base["revision"] and not base["revision"].startswith("gguf"):
        options.append(f'revision="{base["revision"]}"')
    if from_gguf:
        options.append(f'gguf_file="{Path(source).name}"')
        source = Path(source).parent
    elif base["revision"].startswith("gguf"):
        lines = ["# This run's base was read from a GGUF file of this model: its weights are near the hub's, not the same."]
    return [*lines, f'base = AutoModelForCausalLM.from_pretrained("{source}", {", ".join(options)})']


def draw_curves(path: Path, history: list[dict], report: dict) -> None:
    """Loss (raw and smoothed) and gradient norm over the optimizer steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, losses = [h["step"] for h in history], [h["loss"] for h in history]
    smooth, value = [], None
    for loss in losses:
        value = loss if value is None else 0.9 * value + 0.1 * loss
        smooth.append(value)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=110)
    left.plot(steps, losses, color="#bbbbbb", linewidth=0.8, label="each step")
    left.plot(steps, smooth, color="#0072b2", linewidth=2, label="smoothed (0.9)")
    left.set(title="training loss", xlabel="optimizer step", ylabel="nats per supervised token")
    left.set_yscale("log")  # the first steps learn the answer's form, ten times the loss of what follows
    left.legend(frameon=False)
    right.plot(steps, [h.get("grad_norm", float("nan")) for h in history], color="#d55e00", linewidth=1)
    right.set(title="gradient norm before clipping", xlabel="optimizer step", ylabel="norm of all LoRA gradients")
    right.set_yscale("log")
    figure.suptitle(f"{report['base']['name']} on {report['settings']['dataset']}: {report['train']['steps']} steps", fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
