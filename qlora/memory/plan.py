"""Will it fit? Training, inference and merging, here and on well-known cards, from a config alone."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace

import torch

from config import BUNDLED, GPU_DEFAULTS, PAD_MULTIPLE, PRECISIONS
from qlora.cli import UsageError, first_line, note
from qlora.hardware import Hardware
from qlora.memory import step
from qlora.memory.step import Job, planned_model, predict, predict_training
from qlora.shapes import model_config
from qlora.tables import table

# What nvidia-smi reports (MiB), and the compute capability: bf16 and FlashAttention from 8.0, more for cuBLAS
# from 9.0.
CARDS = {
    "T4 16": (15360, (7, 5)),
    "RTX 3060 12": (12288, (8, 6)),
    "RTX 4060 8": (8188, (8, 9)),
    "RTX 4090 24": (24564, (8, 9)),
    "A100 40": (40960, (8, 0)),
    "A100 80": (81920, (8, 0)),
    "H100 80": (81559, (9, 0)),
}
# Held by the CUDA context, loaded kernels and gaps between blocks. An allowance, not a measurement.
CUDA_RESERVE = 0.8 * 2**30
# Python, torch and the other libraries before any tensor, and the heap's gaps. An allowance as well.
CPU_RESERVE = 1.5 * 2**30
FITS = {True: "fits", False: "does not fit"}


def training_job(settings, hardware: Hardware, labels: int = 2) -> Job:
    """The job that these settings (of training or of the demo) describe here; rows of text are all labels."""
    same = {f.name: getattr(settings, f.name) for f in fields(Job) if hasattr(settings, f.name)}
    if getattr(settings, "objective", "") == "preference":  # a pair is two rows
        same["batch_size"] *= 2
    return replace(
        Job(**same),
        device=hardware.device,
        dtype=hardware.dtype,
        length=settings.max_length,
        labels=None if getattr(settings, "objective", "") == "lm" else labels,
        capability=hardware.capability or Job.capability,
        lane=hardware.lane or Job.lane,
    )


def capacity(hardware: Hardware) -> float:
    """Bytes that tensors can have on this machine."""
    return hardware.memory_gib * 2**30 - (CUDA_RESERVE if hardware.device == "cuda" else CPU_RESERVE)


def training_peak(config, job: Job, **changes) -> int:
    """Bytes at the peak of a training step of `job` with these fields changed."""
    return predict(predict_training, config, replace(job, **changes))["peak"]


def default_model(hardware: Hardware, job: Job | None = None) -> tuple[str, str]:
    """(preset, reason) for --model auto: on a GPU the largest of GPU_DEFAULTS that `job` fits with.

    `job` is a training step with default settings if not given.
    """
    if hardware.device == "cpu":
        return BUNDLED, hardware.not_cuda
    # DoRA adds a vector a layer, and can't always be planned.
    job, usable = replace(job or Job(dtype=hardware.dtype), lora_variant="lora"), capacity(hardware)
    for preset in GPU_DEFAULTS:
        peak = training_peak(model_config(preset)[0], job, device="cuda")
        if peak <= usable:
            return preset, f"a training step takes {gb(peak)} of {gb(usable)} GB"
    return preset, f"the smallest, though a training step takes {gb(peak)} of {gb(usable)} GB"


def predict_run(settings, hardware: Hardware, labels: int = 2) -> dict | None:
    """What the widest training step of a run will hold, also told in notes; None if it can't be planned."""
    job = training_job(settings, hardware, labels)
    try:
        predicted = predict(predict_training, model_config(settings.model)[0], job)
    except UsageError:
        raise
    except Exception as error:  # a model that can't be built without data can still be trained
        note(f"memory     not predicted: {first_line(error)}")
        return None
    note(f"memory     {gb(predicted['peak'])} GB predicted in a training step ({in_words(predicted)})")
    if predicted["peak"] > (usable := capacity(hardware)):
        see = f"python quant_llama32_4bit_lora.py --plan --model {settings.model}"
        note(f"           that is more than this machine's {gb(usable)} GB: see {see}")
    return predicted


def make_plan(config, job: Job, hardware: Hardware, gpus: int = 1) -> dict:
    """Predictions for `job` on this machine, and verdicts for CARDS, `gpus` of each."""
    training, usable = predict(predict_training, config, job), capacity(hardware)
    twice = training_peak(config, job, batch_size=2 * job.batch_size)
    verdict, _ = judge(job, usable, training["peak"], twice)
    return {
        "job": {**asdict(job), "dtype": str(job.dtype).removeprefix("torch.")},
        "training": training,
        "inference": predict(step.predict_inference, config, replace(job, batch_size=1)),
        "merge": predict(step.predict_merge, config, job),
        "outside_linear": outside_linear(config),
        "full_fine_tuning": 16 * step.parameters(config),  # fp32: weight, gradient, two moments
        "machine": {
            "name": hardware.name,
            **verdict,
            "remedies": [] if verdict["fits"] else remedies(config, job, usable),
        },
        "gpus": gpus,
        "cards": cards(config, job, gpus),
    }


def judge(job: Job, usable: float, peak: int, twice: int) -> tuple[dict, float]:
    """(verdict, how many times as many tokens again would fit); `twice`: the peak with twice the batch.

    The peak is a straight line in the batch.
    """
    more = (usable - peak) / (twice - peak)
    largest = max(0, job.batch_size + math.floor(more * job.batch_size))
    return {"capacity": usable, "fits": peak <= usable, "largest_batch": largest}, more


def on_several(config, job: Job, gpus: int) -> dict:
    """Bytes at the peak on each of `gpus` cards: `ddp` with a whole copy each, `fsdp` with the base sharded.

    DDP keeps the gradients once more, for sending. FSDP holds its part of each decoder layer, and two layers
    gathered: the one that is computed and the one that comes next. Embeddings, head and adapters stay whole.
    """
    whole = predict(predict_training, config, job)
    layers = config.num_hidden_layers
    outside = predict_weights_outside_layers(config, job)
    of_layers = whole["weights"] - outside
    ddp = whole["peak"] + whole["adapters"]
    held = of_layers // gpus + 2 * of_layers // layers
    return {"ddp": ddp, "fsdp": ddp - of_layers + held, "held_by_fsdp": held + outside}


def predict_weights_outside_layers(config, job: Job) -> int:
    """Bytes of embeddings, head and norm: what the base would hold without its layers."""
    two, three = (step.weights_bytes(step.first_layers(config, n), job) for n in (2, 3))
    return two - 2 * (three - two)


def outside_linear(config) -> int:
    """Bytes at 16 bits of matrices outside linear layers and embeddings: not quantized, no LoRA."""
    known = (torch.nn.Linear, torch.nn.Embedding)
    model = planned_model(config, Job(precision="bf16"), lora=False)
    others = [m for m in model.modules() if not isinstance(m, known) and type(m).__name__ != "Conv1D"]
    return sum(2 * p.numel() for m in others for p in m.parameters(recurse=False) if p.dim() > 1)


def cards(config, job: Job, gpus: int = 1) -> list[dict]:
    """Per card: peak, verdict, the largest batch at this length and the largest length at this batch.

    With `gpus` of them also the peak on each with DDP and with FSDP.

    No kernel that a GPU takes here keeps anything that grows with the square of the length. So the peak is a
    straight line in the number of tokens, and two predictions give both.
    """
    rows, planned = [], {}
    for name, (mebibytes, capability) in CARDS.items():
        gpu = on_card(job, capability)
        if gpu.attention not in planned:
            twice = [training_peak(config, gpu, batch_size=n * job.batch_size) for n in (1, 2)]
            planned[gpu.attention] = gpu, twice, on_several(config, gpu, gpus) if gpus > 1 else {}
        like, peaks, several = planned[gpu.attention]
        more_workspace = gpu.cublas_workspace - like.cublas_workspace  # all else is the same
        peak, twice = (each + more_workspace for each in peaks)
        several = {k: v + more_workspace * (k != "held_by_fsdp") for k, v in several.items()}
        verdict, more = judge(job, mebibytes * 2**20 - CUDA_RESERVE, peak, twice)
        length = max(0, job.length + math.floor(more * job.length))
        length -= length % PAD_MULTIPLE  # rows are padded to it
        length = min(length, getattr(config, "max_position_embeddings", length))
        named = isinstance(PRECISIONS[job.precision], str)
        computes = job.precision if named else "bf16" if capability >= (8, 0) else "fp16"
        attends = "flash" if gpu.attention is step.flash_attention else "efficient"
        what = {"card": name, "dtype": computes, "attention": attends, "peak": peak}
        rows.append({**what, **verdict, "largest_length": length, **several})
    return rows


def on_card(job: Job, capability: tuple[int, int]) -> Job:
    """`job` on a card of this compute capability.

    16 or 32 bits that were asked for are computed in on any card. Else fp16 needs as many bytes as bf16.
    """
    named = isinstance(PRECISIONS[job.precision], str)
    dtype = job.dtype if named else torch.bfloat16
    return replace(job, device="cuda", dtype=dtype, capability=capability)


def remedies(config, job: Job, usable: float) -> list[dict]:
    """What brings the peak down, the mildest first, each with its peak and price; no more once two fit."""
    half = max(job.length // 2, 8)
    one, again = {"batch_size": 1}, {"gradient_checkpointing": True}
    both = one | again if job.batch_size > 1 and not job.gradient_checkpointing else {}
    short, nf4 = {"length": half}, {"precision": "nf4"}
    most = one | again | short | nf4 | {"target_modules": "attention"}
    twice_forward = "each forward runs twice: 6 instead of 4 FLOPs per weight and token"
    tries = [
        (one, f"--batch-size 1 --grad-accum {job.batch_size}", "the same updates in smaller, slower steps"),
        (again, "--gradient-checkpointing", twice_forward),
        (both, "both of these", "both prices"),
        (short, f"--max-length {half}", "the model reads half of a long row"),
        (nf4, "--precision nf4", "quantization error: see --compare"),
        (most, "all of these and --target-modules attention", "all prices, fewer matrices learn"),
    ]
    out: list[dict] = []
    for change, flag, price in tries:
        if replace(job, **change) == job or sum(r["fits"] for r in out) == 2:
            continue
        peak = training_peak(config, job, **change)
        out.append({"change": flag, "peak": peak, "fits": peak <= usable, "price": price})
    return out


def footprints(config) -> dict:
    """Bytes of the base by precision and group; `footprint` is transformers' get_memory_footprint()."""
    names = [name for name, options in reversed(PRECISIONS.items()) if options]  # the others are of files
    return {name: predict(_footprint, config, Job(precision=name)) for name in names}


def _footprint(config, job: Job) -> dict:
    groups = {"embeddings and head": 0, "linear layers": 0, "norms and the rest": 0}
    with step.planned(config, job, lora=False) as (model, live):
        head, group_of = model.get_output_embeddings(), {}  # by tensor: tied weights count once
        for module in model.modules():
            kind = type(module).__name__
            for tensor in module.parameters(recurse=False):
                group_of[tensor] = "norms and the rest"
                if module is head or "Embedding" in kind:
                    group_of[tensor] = "embeddings and head"
                elif tensor.dim() > 1 and ("Linear" in kind or kind == "Conv1D"):
                    group_of[tensor] = "linear layers"
        for tensor in (*group_of, *model.buffers()):
            groups[group_of.get(tensor, "norms and the rest")] += tensor.nbytes
    held, total = sum(groups.values()), live.now
    return {**groups, "block constants": total - held, "total": total, "footprint": held}


def gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def in_words(parts: dict) -> str:
    """{"weights": 1.03e9, "fast_copy": 2e9, "logits": 2e6, "peak": …} -> 'weights 1.03, fast copy 2.00'"""
    large = {kind: size for kind, size in parts.items() if kind != "peak" and size > 5e6}
    return ", ".join(f"{kind.replace('_', ' ')} {gb(size)}" for kind, size in large.items())


def show_footprints(name: str, by_precision: dict) -> None:
    """Weights by precision and group on stdout; transformers' own figure omits the block constants."""
    columns, full = by_precision.values(), by_precision["fp32"]
    labels = {"footprint": "get_memory_footprint() (no block constants)"}
    rows = [[labels.get(key, key), *(f"{c[key] / 1e9:.3f}" for c in columns)] for key in full]
    rows.append(["fp32 is so many times larger", *(f"{full['total'] / c['total']:.2f}" for c in columns)])
    print(table([f"weights of {name}, GB", *by_precision], rows))


def show_plan(plan: dict, config) -> None:
    """The plan as tables on stdout."""
    job, machine, tokens = plan["job"], plan["machine"], plan["job"]["length"]
    context = getattr(config, "max_position_embeddings", tokens)
    lora = f"LoRA r {job['lora_r']} on {job['target_modules']}"
    again = ", gradient checkpointing" if job["gradient_checkpointing"] else ""
    print(f"  rows of {tokens} tokens at {job['precision']}, {lora}{again}")
    print(table(("what", "of which, GB", "GB"), what_it_takes(plan, config), left=2, indent=4))
    if (outside := plan["outside_linear"]) > 0.01 * plan["training"]["weights"]:
        print(f"    {gb(outside)} GB of weights are in no linear layer (experts, convolutions, …):")
        print("    they stay in 16 bits and get no LoRA")
    if tokens > context:
        print(f"  note: the model reads at most {context:,} tokens; rows of {tokens:,} are longer")
    batch, length = f"largest batch at {tokens} tokens", f"largest length at batch {job['batch_size']}"
    print(
        f"  this machine, {machine['name']}, {gb(machine['capacity'])} GB for tensors: training "
        f"{FITS[machine['fits']]}; {batch}: {machine['largest_batch']}"
    )
    if tried := machine["remedies"]:
        rows = [(r["change"], r["price"], gb(r["peak"]), FITS[r["fits"]]) for r in tried]
        print(table(("remedy", "price", "peak GB", "verdict"), rows, left=2, indent=4))
    print("  the same on a GPU (no dequantized copy; no attention matrix: by FlashAttention, or by torch's")
    print("  memory-efficient kernel where a card or a dtype has none)")
    rows = [
        (c["card"], c["dtype"], c["attention"], gb(c["capacity"]), gb(c["peak"]), FITS[c["fits"]])
        + (c["largest_batch"], f"{c['largest_length']:,}")
        for c in plan["cards"]
    ]
    headers = ("card", "computes in", "attention", "usable GB", "peak GB", "verdict", batch, length)
    print(table(headers, rows, left=2, indent=4))
    if plan["gpus"] > 1:
        show_several(plan["gpus"], plan["cards"])
    allowance = f"{CUDA_RESERVE / 2**30:.1f} GiB for CUDA itself, an allowance"
    print(f"    usable: what the driver reports less {allowance}. fp16: the T4 has no bf16 arithmetic.")


def show_several(gpus: int, rows: list[dict]) -> None:
    print(f"  the same on {gpus} GPUs, each with its own rows: GB on each of them")
    shown = []
    for row in rows:
        sizes = [(gb(row[how]), FITS[row[how] <= row["capacity"]]) for how in ("ddp", "fsdp")]
        shown.append((row["card"], gb(row["capacity"]), *sizes[0], *sizes[1]))
    headers = ("card", "usable GB", "DDP: a copy each", "verdict", "FSDP: base sharded", "verdict")
    print(table(headers, shown, left=1, indent=4))
    print(f"    DDP: torchrun --nproc_per_node {gpus} qlora_finetune.py …")
    print(
        "    FSDP: accelerate launch --config_file configs/fsdp_qlora.yaml qlora_finetune.py …; it also takes"
    )
    print("    the whole 4-bit base in the computer's memory, once for each GPU, while it loads")


def what_it_takes(plan: dict, config) -> list[tuple]:
    """(what, its parts, GB at the peak) of training, full fine-tuning, inference and merging."""
    job, training, inference, merge = (plan[k] for k in ("job", "training", "inference", "merge"))
    full, cache, tokens = plan["full_fine_tuning"], inference["kv_cache"], job["length"]
    same = sum(training[kind] for kind in ("weights", "fast_copy", "adapters", "optimizer"))
    same += training["adapters"]  # their gradients
    compared = f"the same here {gb(same)}, {full / same:.1f} times less"
    if full <= same:
        compared = f"adapters this large take more, {gb(same)}"
    context = getattr(config, "max_position_embeddings", tokens)
    limit = f"{gb(cache / tokens * context)} at the model's {context:,} tokens"
    if window := getattr(config, "sliding_window", None):
        limit = f"layers with sliding attention keep at most {window:,} tokens"
    return [
        (f"training, {job['batch_size']} rows", in_words(training), gb(training["peak"])),
        ("full fine-tuning in fp32", f"weights, gradients, AdamW's moments; {compared}", gb(full)),
        ("inference, one prompt", f"KV cache {cache / 1e9:.3f}; {limit}", gb(inference["peak"])),
        ("merging", f"and {gb(merge['disk'])} on the disk", gb(merge["ram"])),
    ]
