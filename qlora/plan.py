"""Will it fit? Bytes of training, inference and merging on this machine and on well-known cards, from a config alone."""

from __future__ import annotations

import dataclasses
import math

import torch

from config import BUNDLED, GPU_DEFAULTS, PAD_MULTIPLE
from qlora.hardware import Hardware
from qlora.ledger import model_config
from qlora.memory import CUBLAS_WORKSPACE, Job, predict, predict_inference, predict_merge, predict_training, planned_model, weights_bytes

# What the driver reports (MiB, nvidia-smi) and the compute capability: bf16 from 8.0, a larger cuBLAS workspace from 9.0.
CARDS = {
    "T4 16": (15360, 7.5), "RTX 3060 12": (12288, 8.6), "RTX 4060 8": (8188, 8.9), "RTX 4090 24": (24564, 8.9),
    "A100 40": (40960, 8.0), "A100 80": (81920, 8.0), "H100 80": (81559, 9.0),
}
# Held by the CUDA context, loaded kernels and gaps between blocks. An allowance, not a measurement.
CUDA_RESERVE = 0.8 * 2**30
# Python, torch and the other libraries before any tensor, and the heap's gaps. An allowance as well.
CPU_RESERVE = 1.5 * 2**30


def footprints(config) -> dict:
    """Bytes of the base by precision and group; `footprint` is what transformers' get_memory_footprint() would say."""
    return {precision: predict(_footprint, config, Job(precision=precision)) for precision in ("fp32", "bf16", "int8", "nf4")}


def _footprint(config, job: Job) -> dict:
    model = planned_model(config, job, lora=False)
    head = model.get_output_embeddings()
    groups = {"embeddings and head": 0, "linear layers": 0, "norms and the rest": sum(b.numel() * b.element_size() for b in model.buffers())}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if module is head and p is model.get_input_embeddings().weight:
                continue  # tied
            kind = ("embeddings and head" if module is head or "Embedding" in type(module).__name__
                    else "linear layers" if ("Linear" in type(module).__name__ or type(module).__name__ == "Conv1D") and name == "weight" else "norms and the rest")
            four_bit, eight_bit = hasattr(p, "quant_type"), hasattr(p, "SCB")
            groups[kind] += p.numel() // 2 if four_bit else p.numel() * (1 if eight_bit else p.element_size())
    footprint, total = sum(groups.values()), weights_bytes(config, job)
    return {**groups, "block constants": total - footprint, "total": total, "footprint": footprint}


def capacity(hardware: Hardware) -> float:
    """Bytes that tensors can have on this machine."""
    return hardware.memory_gib * 2**30 - (CUDA_RESERVE if hardware.device == "cuda" else CPU_RESERVE)


def training_job(settings, hardware: Hardware, every_token: bool = False) -> Job:
    """The job that these settings (of training or of the demo) describe on this machine."""
    s = settings
    hopper = hardware.device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    return Job(s.precision, hardware.device, hardware.dtype, s.batch_size, s.max_length, s.lora_r, s.lora_dropout, s.target_modules,
               s.lora_variant, s.gradient_checkpointing, every_token, hopper)


def default_model(hardware: Hardware, job: Job | None = None) -> tuple[str, str]:
    """(preset, reason) for --model auto: on a GPU the largest of GPU_DEFAULTS that `job` (a default training step if not given) fits with."""
    if hardware.device == "cpu":
        return BUNDLED, "no CUDA device"
    job = dataclasses.replace(job or Job(dtype=hardware.dtype), device="cuda", lora_variant="lora")  # DoRA adds a vector a layer, and can't always be planned
    usable = capacity(hardware)
    for preset in GPU_DEFAULTS:
        peak = predict(predict_training, model_config(preset)[0], job)["peak"]
        if peak <= usable:
            return preset, f"a training step takes {gb(peak)} of {gb(usable)} GB"
    return preset, f"the smallest, though a training step takes {gb(peak)} of {gb(usable)} GB"


def make_plan(config, job: Job, hardware: Hardware) -> dict:
    """Predictions for `job` on this machine, and verdicts for CARDS."""
    training, usable = predict(predict_training, config, job), capacity(hardware)
    fits = training["peak"] <= usable
    twice = predict(predict_training, config, dataclasses.replace(job, batch_size=2 * job.batch_size))["peak"]
    more = (usable - training["peak"]) / (twice - training["peak"])  # the peak is a straight line in the batch
    return {
        "job": {**dataclasses.asdict(job), "dtype": str(job.dtype).removeprefix("torch.")},
        "training": training,
        "inference": predict(predict_inference, config, dataclasses.replace(job, batch_size=1)),
        "merge": predict(predict_merge, config, job),
        "outside_linear": outside_linear(config),
        "full_fine_tuning": 16 * planned_model(config, Job(precision="bf16"), lora=False).num_parameters(),  # fp32: weight, gradient, two moments
        "machine": {"name": hardware.name, "capacity": usable, "fits": fits, "largest_batch": max(0, job.batch_size + math.floor(more * job.batch_size)),
                    "remedies": [] if fits else remedies(config, job, usable)},
        "cards": cards(config, job),
    }


def outside_linear(config) -> int:
    """Bytes at 16 bits of large weights that are in no nn.Linear, embedding or norm: neither quantization nor LoRA takes them."""
    model = planned_model(config, Job(precision="bf16"), lora=False)
    return sum(2 * p.numel() for m in model.modules() for p in m.parameters(recurse=False)
               if p.dim() > 1 and not isinstance(m, (torch.nn.Linear, torch.nn.Embedding)) and type(m).__name__ != "Conv1D")


def cards(config, job: Job) -> list[dict]:
    """Per card: peak, verdict, the largest batch at this length and the largest length at this batch.

    A GPU's attention keeps nothing that grows with the square of the length, so the peak is a straight line in the number of
    tokens: two predictions give both.
    """
    named = job.precision in ("bf16", "fp16", "fp32")  # asked for by name: computed in it on any card
    gpu = dataclasses.replace(job, device="cuda", dtype=job.dtype if named else torch.bfloat16)  # fp16 holds as many bytes
    base, twice = (predict(predict_training, config, variant)["peak"] for variant in (gpu, dataclasses.replace(gpu, batch_size=2 * gpu.batch_size)))
    rows = []
    for name, (mebibytes, capability) in CARDS.items():
        usable = mebibytes * 2**20 - CUDA_RESERVE
        peak = base + CUBLAS_WORKSPACE[capability >= 9] - CUBLAS_WORKSPACE[False]
        more = (usable - peak) / (twice - base)  # times as many tokens again
        batch, length = job.batch_size + math.floor(more * job.batch_size), job.length + math.floor(more * job.length)
        length -= length % PAD_MULTIPLE  # rows are padded to it
        context = getattr(config, "max_position_embeddings", length)
        rows.append({"card": name, "dtype": job.precision if named else "bf16" if capability >= 8 else "fp16", "capacity": usable, "peak": peak, "fits": peak <= usable,
                     "largest_batch": max(0, batch), "largest_length": max(0, min(length, context))})
    return rows


def remedies(config, job: Job, usable: float) -> list[dict]:
    """What brings the peak down, the mildest first, each with its peak and its price; up to the second that is enough."""
    half = max(job.length // 2, 8)
    small = dict(batch_size=1, gradient_checkpointing=True)
    tries = [
        (dict(batch_size=1), f"--batch-size 1 --grad-accum {job.batch_size}", "the same updates in smaller, slower steps"),
        (dict(gradient_checkpointing=True), "--gradient-checkpointing", "each forward runs twice: 6 instead of 4 products per weight and token"),
        (small if job.batch_size > 1 and not job.gradient_checkpointing else {}, "both of these", "both prices"),
        (dict(length=half), f"--max-length {half}", "the model reads half of a long row"),
        (dict(precision="nf4"), "--precision nf4", "quantization error: see --compare"),
        (dict(small, length=half, precision="nf4", target_modules="attention"), "all of these and --target-modules attention", "all prices, fewer matrices learn"),
    ]
    out: list[dict] = []
    for change, flag, price in tries:
        if dataclasses.replace(job, **change) == job or sum(r["fits"] for r in out) == 2:
            continue
        peak = predict(predict_training, config, dataclasses.replace(job, **change))["peak"]
        out.append({"change": flag, "peak": peak, "fits": peak <= usable, "price": price})
    return out


def gb(count: float) -> str:
    return f"{count / 1e9:.2f}"


def show_footprints(name: str, table: dict) -> None:
    """Weights by precision and group; what transformers says, which leaves the block constants out."""
    print(f"  {f'weights of {name}, GB':<32}" + "".join(f"{p:>9}" for p in table))
    for group in ("embeddings and head", "linear layers", "norms and the rest", "block constants", "total"):
        print(f"    {group:<30}" + "".join(f"{row[group] / 1e9:9.3f}" for row in table.values()))
    print(f"    {'get_memory_footprint()':<30}" + "".join(f"{row['footprint'] / 1e9:9.3f}" for row in table.values()) + "   (no block constants)")
    print(f"    {'fp32 is so many times larger':<30}" + "".join(f"{table['fp32']['total'] / row['total']:9.2f}" for row in table.values()))


def show_plan(plan: dict, config) -> None:
    """The plan as tables on stdout."""
    job, training, inference, merge, machine = (plan[k] for k in ("job", "training", "inference", "merge", "machine"))
    context, full, sliding = getattr(config, "max_position_embeddings", job["length"]), plan["full_fine_tuning"], getattr(config, "sliding_window", None)
    print(f"  training {job['batch_size']} rows of {job['length']} tokens at {job['precision']}, LoRA r {job['lora_r']} on {job['target_modules']}"
          f"{', gradient checkpointing' if job['gradient_checkpointing'] else ''}: {gb(training['peak'])} GB at the peak")
    print("    " + ", ".join(f"{kind.replace('_', ' ')} {gb(training[kind])}" for kind in training if kind != "peak" and training[kind] > 5e6))
    fixed = sum(training[kind] for kind in ("weights", "fast_copy", "adapters", "optimizer")) + training["adapters"]  # its gradients
    print(f"    full fine-tuning in fp32 with AdamW: {gb(full)} GB for weights, gradients and moments; the same here: {gb(fixed)} GB, "
          f"{full / fixed:.1f} times less" if full > fixed else "    adapters this large take more than full fine-tuning would")
    if (outside := plan["outside_linear"]) > 0.01 * training["weights"]:
        print(f"    {gb(outside)} GB of weights are in no linear layer (experts, convolutions, …): they stay in 16 bits and get no LoRA")
    if job["length"] > context:
        print(f"  note: the model reads at most {context:,} tokens; rows of {job['length']:,} are beyond it")
    print(f"  inference, one prompt of {job['length']} tokens: {gb(inference['peak'])} GB (KV cache {inference['kv_cache'] / 1e6:.0f} MB; "
          + (f"{inference['kv_cache'] / job['length'] * context / 1e9:.2f} GB at the model's {context:,} tokens)" if not sliding
             else f"at most {sliding:,} tokens are kept in layers with sliding attention)"))
    print(f"  merging: {gb(merge['ram'])} GB of memory, {gb(merge['disk'])} GB of disk")
    print(f"  this machine, {machine['name']}, {gb(machine['capacity'])} GB for tensors: training {'fits' if machine['fits'] else 'DOES NOT FIT'}; "
          f"largest batch at {job['length']} tokens: {machine['largest_batch']}")
    for remedy in machine["remedies"]:
        print(f"    {remedy['change']:<46}{gb(remedy['peak']):>7} GB, {'fits' if remedy['fits'] else 'does not fit'}; price: {remedy['price']}")
    batch, length = f"largest batch at {job['length']} tokens", f"largest length at batch {job['batch_size']}"
    print(f"  the same on a GPU (attention without its matrix, no dequantized copy)\n    {'card':<14}{'products in':<13}{'usable GB':>9}{'peak GB':>9}   {'verdict':<14}{batch}   {length}")
    for row in plan["cards"]:
        verdict = "fits" if row["fits"] else "does not fit"
        print(f"    {row['card']:<14}{row['dtype']:<13}{gb(row['capacity']):>9}{gb(row['peak']):>9}   {verdict:<14}{row['largest_batch']:>{len(batch)}}   {row['largest_length']:>{len(length)},}")
    print(f"    usable: what the driver reports less {CUDA_RESERVE / 2**30:.1f} GiB for CUDA itself, an allowance. fp16: the T4 has no bf16 arithmetic.")
