"""What the Trainer needs and does not have: batches by length, checkpoints that are complete or absent, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerState

from config import KEEP_CHECKPOINTS
from qlora import guards as g
from qlora.cli import note
from qlora.data import LengthBatches
from qlora.fetch import sha256_of
from qlora.hardware import peak_memory_bytes, return_freed_memory
from qlora.live_bytes import LiveBytes

MANIFEST, MEASURED = "complete.json", "measured.json"


class QLoRATrainer(Trainer):
    """HF Trainer with length-sorted batches, staged checkpoints, and counts of real (unpadded) tokens and of live bytes.

    The counts travel in each checkpoint: what a resumed run reports is all of it, not its last part.
    """

    processes = 1
    run_started = train_started = 0.0  # of time.perf_counter, moved back by what earlier processes took
    real_tokens = 0
    peak_bytes = 0  # of tensors, in a step: on a GPU by its allocator, on a CPU counted in the widest steps so far
    process_peak_bytes = 0  # of earlier processes
    guards: g.Guards
    _widest = 0
    _staging: str | None = None

    def measured(self) -> dict:
        """What training has taken so far."""
        now = time.perf_counter()
        return {
            "processes": self.processes, "run_seconds": now - self.run_started, "seconds": now - self.train_started,
            "real_tokens": self.real_tokens, "peak_bytes": self.peak_bytes,
            "process_peak_bytes": max(self.process_peak_bytes, peak_memory_bytes(self.args.device.type)),
            "guards": [r for r in self.guards.results if r["name"] == "all_matrices_learn"],
        }

    def take_up(self, checkpoint: Path) -> bool:
        """Count on from where the process that wrote `checkpoint` was; True (and its weights loaded) if no step is left to do."""
        earlier = json.loads((checkpoint / MEASURED).read_text())
        self.processes = earlier["processes"] + 1
        self.run_started -= earlier["run_seconds"]
        self.train_started -= earlier["seconds"]
        self.real_tokens, self.peak_bytes, self.process_peak_bytes = (earlier[k] for k in ("real_tokens", "peak_bytes", "process_peak_bytes"))
        self.guards.results += earlier["guards"]
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < state.max_steps:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    def _get_train_sampler(self, train_dataset=None):
        data = train_dataset if train_dataset is not None else self.train_dataset
        return LengthBatches([len(e["input_ids"]) for e in data], self.args.train_batch_size, self.args.seed)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.real_tokens += inputs.pop("real_tokens")
        if self.args.device.type == "cuda":
            if not self._widest:
                self._widest = 1
                torch.cuda.reset_peak_memory_stats()
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
            return loss
        width = inputs["input_ids"].shape[1]
        if width <= self._widest:
            return super().training_step(model, inputs, num_items_in_batch)
        self._widest = width if self.state.global_step else 0  # the first step has no optimizer state yet: look again
        live = LiveBytes()
        live.count_existing()
        with live:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.peak_bytes = max(self.peak_bytes, live.peak)
        return loss

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Write into a staging folder, list every file with its hash, then rename: a checkpoint is complete or absent."""
        if not self.args.should_save:
            return super()._save_checkpoint(model, trial)
        out, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        with staging(out) as aside:
            self._staging = str(aside)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            (aside / name / MEASURED).write_text(json.dumps(self.measured()))
            seal(aside / name)
            shutil.rmtree(out / name, ignore_errors=True)
            os.rename(aside / name, out / name)
        # Those of later steps were passed over: damaged, or of an older version.
        kept = [folder for folder in checkpoints(out) if step_of(folder) <= self.state.global_step][:KEEP_CHECKPOINTS]
        for old in set(checkpoints(out)) - set(kept):
            shutil.rmtree(old)


@contextlib.contextmanager
def staging(out: Path):
    """An empty folder beside the final names (so that a rename is enough), gone afterwards."""
    aside = out / ".staging"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def seal(folder: Path) -> None:
    """Flush every file to the disk and write the manifest {file: sha256} last."""
    hashes = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        hashes[str(path.relative_to(folder))] = sha256_of(path)
    with open(folder / MANIFEST, "w") as file:
        json.dump(hashes, file)
        file.flush()
        os.fsync(file.fileno())


def checkpoints(out: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in out.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_complete(out: Path) -> Path | None:
    """Newest checkpoint whose files all have the hashes of its manifest; others are named and passed over."""
    for folder in checkpoints(out):
        try:
            hashes = json.loads((folder / MANIFEST).read_text())
            if MEASURED in hashes and all(sha256_of(folder / name) == digest for name, digest in hashes.items()):
                return folder
        except (OSError, ValueError):
            pass
        note(f"{folder} is incomplete, damaged or of an older version: passed over")
    return None


class Interrupt:
    """Ctrl-C (and SIGTERM) once: finish the step, save, stop. Twice: stop at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in getattr(self, "_before", {}).items():
            signal.signal(number, handler)

    def _handle(self, *_):
        if self.asked:
            raise KeyboardInterrupt("stopped without saving; go on from the last checkpoint with --resume")
        self.asked = True
        note("\nstopping after this step and saving; press Ctrl-C again to stop at once")


class Watch(TrainerCallback):
    """Progress, and the guards that look during training."""

    def __init__(self, guards: g.Guards, interrupt: Interrupt):
        self.guards, self.interrupt = guards, interrupt
        self.trainer: QLoRATrainer | None = None
        self.bar: tqdm | None = None
        self.updates = 0
        self.checked = False

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", mininterval=2)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        # Warm-up starts at a rate of zero, so B leaves zero in the second update; A's gradient is zero while B is.
        # With a scaler (fp16) an update whose gradients overflowed is skipped: look at the next.
        self.updates += 1
        if self.checked or self.updates < 3:
            return
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        if all(norm.isfinite() for norm in norms):
            self.checked = True
            self.guards.results = [r for r in self.guards.results if r["name"] != "all_matrices_learn"]  # an earlier process's
            g.all_matrices_learn(self.guards, model)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)
        if args.use_cpu and state.global_step % 20 == 0:
            return_freed_memory()
        if self.interrupt.asked:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        for what in ("loss", "grad_norm"):
            # A scaler's first steps overflow by design: it lowers the scale and skips them.
            if what == "loss" or self.trainer.accelerator.scaler is None:
                g.finite(self.guards, float(logs.get(what, 0.0)), what, state.global_step)
        if self.bar:
            rate = self.trainer.real_tokens / (time.perf_counter() - self.trainer.train_started)
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, {rate:.0f} tokens/s")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            self.bar.close()

