"""The memory plan against what training really holds: predicted from the config, then measured.

    python benchmarks/memory_prediction.py   # on this machine

Writes results/memory_prediction_<device>.json and .png; one process per job. On a CPU: the bundled model with
its weights; measured is the peak of torch's own allocator during the third training step, as torch.profiler
records it, kernels' scratch included. On a GPU: random weights at Llama's 1B, 3B and 8B shapes (memory does
not depend on values); measured is torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qlora  # noqa: F401, I001  (first: it sets what torch reads when it is imported)
import torch
from peft import get_peft_model

from config import MAX_GRAD_NORM, PAD_MULTIPLE
from qlora.fast import make_fast
from qlora.hardware import detect, environment
from qlora.live_bytes import LiveBytes
from qlora.loading import load_base
from qlora.logits import IGNORE
from qlora.lora import lora_config
from qlora.memory.step import Job, fill, planned_model, predict_training
from qlora.pictures import COLOURS, new_axes, save
from qlora.shapes import model_config

RESULTS = Path(__file__).parent / "results"
GPU_MODELS = ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")
CPU_JOBS = (
    {},
    {"batch_size": 1},
    {"batch_size": 8},
    {"length": 128},
    {"length": 512, "batch_size": 2},
    {"length": 1024, "batch_size": 1},
    {"gradient_checkpointing": True},
    {"labels": None},
    {"target_modules": "attention", "lora_r": 32},
    {"lora_r": 64},
    {"precision": "fp4", "batch_size": 2},
    {"precision": "bf16"},
    {"precision": "int8", "length": 128},
    {"precision": "fp32", "length": 128},
)
GPU_JOBS = (
    {},
    {"batch_size": 1, "length": 512},
    {"batch_size": 8, "length": 512},
    {"batch_size": 8, "length": 512, "gradient_checkpointing": True},
    {"batch_size": 2, "length": 1024, "labels": None},
    {"precision": "bf16"},
    {"precision": "int8"},
    {"lora_r": 64, "target_modules": "attention"},
)
JOBS = {
    "cpu": [("smollm2-135m", job) for job in CPU_JOBS],
    "cuda": [(model, job) for model in GPU_MODELS for job in GPU_JOBS],
}


def measure(model_name: str, given: dict) -> dict:
    """{"predicted": …, "measured": …, "parts": …} in bytes, for one job on this machine."""
    hardware = detect(given.get("precision", "nf4"))
    capability = hardware.capability or Job.capability
    where = {"device": hardware.device, "dtype": hardware.dtype, "lane": hardware.lane or Job.lane}
    job = Job(**given, **where, capability=capability)
    config = model_config(model_name)[0]
    predicted = predict_training(config, job)
    lm = random_model(config, job) if job.on_gpu else load_base(model_name, job.precision, hardware).model
    step, _ = prepare(lm, job)
    step(), step()
    if job.on_gpu:
        torch.cuda.reset_peak_memory_stats()
        step()
        measured = torch.cuda.max_memory_allocated()
    else:
        gc.collect()
        between_steps = LiveBytes()
        between_steps.count_existing()
        measured = between_steps.now + allocator_peak(step)
    return {"predicted": predicted["peak"], "measured": measured, "parts": predicted}


def prepare(lm, job: Job):
    """(a function that takes one training step as the Trainer does and returns the loss, the PEFT model)"""
    model = get_peft_model(lm, lora_config(lm, job))
    if job.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    make_fast(model, job.lane)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(job.device, enabled=job.dtype == torch.float16)
    width = -(-job.length // PAD_MULTIPLE) * PAD_MULTIPLE
    ids = torch.randint(0, lm.config.vocab_size, (job.batch_size, width), device=job.device)
    labels = ids.clone()
    if job.labels is not None:
        labels[:, :-2] = IGNORE

    def step():
        with autocast(job):
            loss = model(input_ids=ids, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    return step, model


def autocast(job: Job):
    return torch.autocast("cuda", dtype=job.dtype, enabled=job.on_gpu and job.dtype != torch.float32)


def random_model(config, job: Job):
    """The planned model with random values in its tensors, which never existed in 16 bits."""
    model = planned_model(config, job, lora=False)
    fill(model, device=job.device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
                continue
            parameter.random_()
            if hasattr(parameter, "quant_state"):  # weights of 0.05 at most
                parameter.quant_state.absmax.fill_(1)
                parameter.quant_state.state2.absmax.fill_(0.1)
                parameter.quant_state.offset.fill_(0.05)
            else:
                parameter.SCB.fill_(0.05)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(job.device)
    return model


def allocator_peak(step) -> int:
    """Most bytes that torch's CPU allocator held at once during `step`, over what it held before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def draw(rows: list[dict], device: str) -> Path:
    fig, axes = new_axes(8, 5)
    top = 1.1 * max(max(r["predicted"], r["measured"]) for r in rows) / 1e9
    within = 0.05 if device == "cuda" else 0.10
    band = [0, top * (1 - within)], [0, top * (1 + within)]
    axes.fill_between([0, top], *band, color="#dddddd", label=f"within {100 * within:.0f}%")
    axes.plot([0, top], [0, top], color="black", linewidth=1)
    for i, model in enumerate(dict.fromkeys(r["model"] for r in rows)):
        points = [(r["predicted"] / 1e9, r["measured"] / 1e9) for r in rows if r["model"] == model]
        axes.plot(*zip(*points), "os^D"[i], color=COLOURS[i], label=model)
    axes.set(xlabel="predicted peak, GB", ylabel="measured peak, GB", xlim=(0, top), ylim=(0, top))
    axes.set_title(f"Memory of a training step, {len(rows)} jobs, {device}")
    axes.legend()
    out = RESULTS / f"memory_prediction_{device}.png"
    save(fig, out)
    return out


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(*json.loads(sys.argv[1]))))
        return
    hardware = detect()
    rows, failed = [], []
    for model_name, given in JOBS[hardware.device]:
        command = [sys.executable, __file__, json.dumps([model_name, given])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            error = done.stderr.strip().splitlines()[-1]
            failed.append({"model": model_name, "job": given, "error": error})
            print(f"{model_name} {given}: {error}", flush=True)
            continue
        row = {"model": model_name, "job": given, **json.loads(done.stdout.splitlines()[-1])}
        row["error"] = row["predicted"] / row["measured"] - 1
        rows.append(row)
        sizes = f"{row['predicted'] / 1e9:8.3f} GB predicted {row['measured'] / 1e9:8.3f} measured"
        print(f"{model_name:<14}{sizes} {100 * row['error']:+6.1f}%   {given}", flush=True)
    worst = max(rows, key=lambda r: abs(r["error"]))
    print(f"{len(rows)} jobs, largest error {100 * worst['error']:+.1f}%")
    result = {"environment": environment(hardware), "rows": rows, "failed": failed}
    (RESULTS / f"memory_prediction_{hardware.device}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"written {draw(rows, hardware.device)}")


if __name__ == "__main__":
    main()
