"""The memory plan against what training really holds: predicted from the config, then measured on the same job.

    python benchmarks/memory_prediction.py               # this machine; writes results/memory_prediction_<device>.json and .png

On a CPU: the bundled model, real weights; measured is the peak of torch's own allocator during the third training step, as
torch.profiler records it, kernels' scratch included. On a GPU: random weights at Llama's 1B, 3B and 8B shapes (memory does not
depend on values); measured is torch.cuda.max_memory_allocated. One process per job.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qlora  # noqa: E402,F401

RESULTS = Path(__file__).parent / "results"
JOBS = {
    "cpu": [("smollm2-135m", job) for job in (
        dict(), dict(batch_size=1), dict(batch_size=8), dict(length=128), dict(length=512, batch_size=2), dict(length=1024, batch_size=1),
        dict(gradient_checkpointing=True), dict(every_token=True), dict(target_modules="attention", lora_r=32), dict(lora_r=64),
        dict(precision="fp4", batch_size=2), dict(precision="bf16"), dict(precision="int8", length=128), dict(precision="fp32", length=128))],
    "cuda": [(model, job) for model in ("llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b") for job in (
        dict(), dict(batch_size=1, length=512), dict(batch_size=8, length=512), dict(batch_size=8, length=512, gradient_checkpointing=True),
        dict(batch_size=2, length=1024, every_token=True), dict(precision="bf16"), dict(precision="int8"), dict(lora_r=64, target_modules="attention"))],
}


def measure(model_name: str, job) -> dict:
    """{"predicted": …, "measured": …} in bytes, for one job on this machine."""
    import torch

    from qlora.ledger import model_config
    from qlora.memory import predict_training

    config = model_config(model_name)[0]
    predicted = predict_training(config, job)
    lm = random_model(config, job) if job.device == "cuda" else bundled_model(model_name, job)
    step, trained = prepare(lm, job)
    step(), step()
    if job.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        measured = torch.cuda.max_memory_allocated()
    else:
        measured = reachable_bytes() + allocator_peak(step)
    return {"predicted": predicted["peak"], "measured": measured, "parts": predicted}


def prepare(lm, job):
    """(a function that takes one training step as the Trainer does, the trained parameters)"""
    import torch
    from peft import LoraConfig, get_peft_model

    from config import PAD_MULTIPLE
    from qlora.fast import speed_up_base, speed_up_lora
    from qlora.logits import loss_at_labels
    from qlora.lora import resolve_targets

    gpu = job.device == "cuda"
    if not gpu:
        speed_up_base(lm)
    loss_at_labels(lm)
    model = get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", r=job.lora_r, lora_alpha=2 * job.lora_r,
                                          target_modules=resolve_targets(lm, job.target_modules)))
    if job.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not gpu:
        speed_up_lora(model)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(job.device, enabled=job.dtype == torch.float16)
    width = -(-job.length // PAD_MULTIPLE) * PAD_MULTIPLE
    ids = torch.randint(0, lm.config.vocab_size, (job.batch_size, width), device=job.device)
    labels = ids.clone()
    if not job.every_token:
        labels[:, :-2] = -100

    def step():
        with torch.autocast("cuda", dtype=job.dtype, enabled=gpu and job.dtype != torch.float32):
            loss = model(input_ids=ids, labels=labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step, trained


def bundled_model(name: str, job):
    from qlora.hardware import detect
    from qlora.loading import load_base

    return load_base(name, job.precision, detect(job.precision)).model


def random_model(config, job):
    """The planned model with random values in its tensors, on the GPU."""
    import torch

    from qlora.memory import fill, planned_model

    model = planned_model(config, job, lora=False)
    fill(model, model.dtype, device=job.device)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if parameter.dtype.is_floating_point:
                    parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
                elif hasattr(parameter, "quant_state"):  # uninitialized constants could be NaN
                    parameter.quant_state.absmax.fill_(1)
                    parameter.quant_state.state2.absmax.fill_(0.1)
                    parameter.quant_state.offset.fill_(0.05)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(job.device)
    return model


def reachable_bytes() -> int:
    """Bytes of all tensors that exist between two steps."""
    import gc

    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def allocator_peak(step) -> int:
    """Most bytes that torch's CPU allocator held at once during `step`, over what it held before."""
    import torch

    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, change in events:
        now += change
        peak = max(peak, now)
    return peak


def draw(rows: list[dict], device: str) -> Path:
    from qlora.pictures import COLOURS, new_axes, save

    fig, axes = new_axes(8, 5)
    top = 1.1 * max(max(r["predicted"], r["measured"]) for r in rows) / 1e9
    allowed = 0.05 if device == "cuda" else 0.10
    axes.fill_between([0, top], [0, top * (1 - allowed)], [0, top * (1 + allowed)], color="#dddddd", label=f"within {100 * allowed:.0f}%")
    axes.plot([0, top], [0, top], color="black", linewidth=1)
    for i, model in enumerate(dict.fromkeys(r["model"] for r in rows)):
        mine = [r for r in rows if r["model"] == model]
        axes.plot([r["predicted"] / 1e9 for r in mine], [r["measured"] / 1e9 for r in mine], "os^D"[i], color=COLOURS[i], label=model)
    axes.set(xlabel="predicted peak, GB", ylabel="measured peak, GB", xlim=(0, top), ylim=(0, top), title=f"Memory of a training step, {len(rows)} jobs, {device}")
    axes.legend()
    out = RESULTS / f"memory_prediction_{device}.png"
    save(fig, out)
    return out


def main() -> None:
    import torch

    from qlora.hardware import detect, environment
    from qlora.memory import Job

    hardware = detect()
    hopper = hardware.device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    if len(sys.argv) > 1:
        model_name, given = json.loads(sys.argv[1])
        precision = given.get("precision", "nf4")
        print(json.dumps(measure(model_name, Job(**given, device=hardware.device, dtype=detect(precision).dtype, hopper=hopper))))
        return
    rows, failed = [], []
    for model_name, given in JOBS[hardware.device]:
        done = subprocess.run([sys.executable, __file__, json.dumps([model_name, given])], capture_output=True, text=True)
        if done.returncode:
            failed.append({"model": model_name, "job": given, "error": done.stderr.strip().splitlines()[-1]})
            print(f"{model_name} {given}: {failed[-1]['error']}", flush=True)
            continue
        row = {"model": model_name, "job": given, **json.loads(done.stdout.splitlines()[-1])}
        row["error"] = row["predicted"] / row["measured"] - 1
        rows.append(row)
        print(f"{model_name:<14}{row['predicted'] / 1e9:8.3f} GB predicted {row['measured'] / 1e9:8.3f} measured {100 * row['error']:+6.1f}%   {given}", flush=True)
    worst = max(rows, key=lambda r: abs(r["error"]))
    print(f"{len(rows)} jobs, largest error {100 * worst['error']:+.1f}%")
    (RESULTS / f"memory_prediction_{hardware.device}.json").write_text(json.dumps({"environment": environment(hardware), "rows": rows, "failed": failed}, indent=1) + "\n")
    print(f"written {draw(rows, hardware.device)}")


if __name__ == "__main__":
    main()
