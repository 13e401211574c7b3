"""What HF's Trainer lacks: batches by length, checkpoints that are complete or absent, Ctrl-C."""

import contextlib
import json
import signal
import threading
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from config import KEEP_CHECKPOINTS, PAD_MULTIPLE
from qlora import processes
from qlora.batches import BLANK, BLANK_PAIR, LengthBatches, collate, in_pairs
from qlora.cli import note
from qlora.files import broken_files, discard, publish, scratch, seal
from qlora.hardware import peak_memory_bytes, return_freed_memory
from qlora.live_bytes import StepPeak
from qlora.training.guards import Guards, all_matrices_learn, check_step
from qlora.training.preferences import real_pairs
from qlora.training.run_folder import Run

MEASURED = "measured.json"


class Counts:
    """What training takes; in each checkpoint as measured.json, so that a resumed run reports all of it.

    (transformers' include_num_input_tokens_seen needs an attention mask to leave padding out; there is none.)
    """

    def __init__(self, run_started: float, device: str):
        self.processes, self.real_tokens, self.applied, self.earlier = 1, 0, 0, {}
        self.run_started, self.train_started = run_started, time.perf_counter()
        self.device, self.peak = device, StepPeak(device)  # peak: of tensors, in a training step

    def measured(self) -> dict:
        now, before = time.perf_counter(), self.earlier
        return {
            "processes": self.processes,
            "run_seconds": now - self.run_started + before.get("run_seconds", 0),
            "seconds": now - self.train_started + before.get("seconds", 0),
            "real_tokens": self.real_tokens,
            "applied_updates": self.applied,
            "peak_bytes": self.peak.bytes,
            "process_peak_bytes": max(peak_memory_bytes(self.device), before.get("process_peak_bytes", 0)),
        }

    def go_on_from(self, earlier: dict, step: int) -> None:
        """`earlier`: what measured() said at `step`."""
        self.earlier, self.processes = earlier, earlier["processes"] + 1
        self.applied = earlier.get("applied_updates", step)  # older versions did not count them
        self.real_tokens, self.peak.bytes = earlier["real_tokens"], earlier["peak_bytes"]


class QLoRATrainer(Trainer):
    """HF's Trainer with batches by length, staged checkpoints, counts of unpadded tokens and live bytes."""

    def __init__(self, model, args, train_dataset: list[dict], base, run: Run, guards: Guards):
        self.guards, self.run, self.counts = guards, run, Counts(run.started, args.device.type)
        self.interrupt, self._staging = Interrupt(), None
        collator = partial(collate, pad_id=base.tokenizer.pad_token_id, multiple=PAD_MULTIPLE)
        blank = BLANK
        if "reference" in train_dataset[0]:  # preferences: a row is a pair
            train_dataset, blank = in_pairs(train_dataset), BLANK_PAIR
        if processes.count() > 1:
            train_dataset = [*train_dataset, blank]
        super().__init__(model, args, collator, train_dataset, processing_class=base.tokenizer)
        self.watch = Watch(self)
        self.add_callback(self.watch)
        self.remove_callback(PrinterCallback)

    def train_or_resume(self) -> dict:
        """Train from the last complete checkpoint, or from the start; returns what it took, see Counts.

        Raises KeyboardInterrupt, which says how to continue, after Ctrl-C; the state is saved then.
        """
        with self.interrupt:
            checkpoint = last_complete(self.run.out) if processes.is_first() else None
            checkpoint = processes.told_by_first(checkpoint)
            if checkpoint:
                note(f"resuming from {checkpoint}")
            try:
                if not (checkpoint and self._restore(checkpoint)):
                    self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                self.watch.close()  # an error message starts on a line of its own
        if self.interrupt.asked or self.interrupt.agreed:
            step = self.state.global_step
            raise KeyboardInterrupt(f"saved at step {step}; continue with: {self.run.resume_command}")
        return self.counts.measured()

    @property
    def history(self) -> list[dict]:
        """[{step, loss, grad_norm, learning_rate, ...}], one for each optimizer step of the whole run."""
        return [logged for logged in self.state.log_history if "loss" in logged]

    def _restore(self, checkpoint: Path) -> bool:
        """Count on from where the process that wrote `checkpoint` was; True if no step is left to do."""
        earlier = json.loads((checkpoint / MEASURED).read_text())
        self.guards.results += earlier["guards"]
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.counts.go_on_from(earlier, state.global_step)
        if state.global_step < state.max_steps:
            return False
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        return True

    def _load_scaler(self, checkpoint):
        if self.accelerator.scaler is not None:  # else the file is not ours: no run in this dtype writes one
            super()._load_scaler(checkpoint)

    def _get_train_sampler(self, train_dataset=None):
        lengths = [len(e["input_ids"]) for e in self.train_dataset if not (e is BLANK or e is BLANK_PAIR)]
        return LengthBatches(lengths, self.args.train_batch_size, self.args.seed, processes.count())

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Of one update: its batches, and the number of labels in them, of all processes together."""
        batches, labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        (tokens,) = processes.added_up([sum(batch.pop("real_tokens") for batch in batches)], device)
        self.counts.real_tokens += int(tokens)
        return batches, labels

    def _get_num_items_in_batch(self, batches: list, device):
        """Labels in the batches of one update, of all processes together; of pairs their number."""
        if not batches or "reference" not in batches[0]:
            return super()._get_num_items_in_batch(batches, device)
        (pairs,) = processes.added_up([sum(int(real_pairs(b["labels"]).sum()) for b in batches)], device)
        return int(pairs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        width = inputs["input_ids"].shape[1]
        with self.counts.peak.watch(width, steady=self.state.global_step > 0):
            return super().training_step(model, inputs, num_items_in_batch)

    def _get_output_dir(self, trial):
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model, trial):
        """Write aside, list every file with its hash, then rename: a checkpoint is complete or absent."""
        out, name = self.run.out, f"checkpoint-{self.state.global_step}"
        with scratch(out) if processes.is_first() else contextlib.nullcontext() as aside:
            self._staging = processes.told_by_first(aside)  # each process writes its random state there
            made = self._staging / name
            try:
                super()._save_checkpoint(model, trial)
                processes.wait()
            finally:
                self._staging = None
            if processes.is_first():
                self._publish(made)
        processes.wait()

    def _publish(self, made: Path) -> None:
        out = self.run.out
        # It looks once in a process: a resumed run takes the result over.
        measured = self.counts.measured() | {"guards": self.guards.of("all_matrices_learn")}
        (made / MEASURED).write_text(json.dumps(measured))
        seal(made)
        discard(out / made.name)
        publish(made, out / made.name)
        # Checkpoints of later steps were skipped when the run began: damaged, or of an older version.
        kept = [folder for folder in checkpoints(out) if step_of(folder) <= self.state.global_step]
        for old in set(checkpoints(out)) - set(kept[:KEEP_CHECKPOINTS]):
            discard(old)


def checkpoints(out: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    numbered = [p for p in out.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(numbered, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_complete(out: Path) -> Path | None:
    """Newest checkpoint that is whole by its complete.json; the others are named and skipped."""
    for folder in checkpoints(out):
        if broken_files(folder) == [] and (folder / MEASURED).exists():
            return folder
        note(f"{folder} is incomplete, damaged or of an older version: skipped")
    return None


class Interrupt:
    """Ctrl-C (and SIGTERM) once: finish the step, save, stop. Twice: stop at once."""

    def __init__(self):
        self.asked, self.agreed, self._before = False, False, {}  # agreed: by all processes

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, *_):
        if self.asked:
            raise KeyboardInterrupt("stopped without saving; continue from the last checkpoint with --resume")
        self.asked = True
        note("\nstopping after this step and saving; press Ctrl-C again to stop at once")


class Watch(TrainerCallback):
    """Progress, and the guards that look during training."""

    def __init__(self, trainer: QLoRATrainer):
        self.guards, self.counts, self.interrupt = trainer.guards, trainer.counts, trainer.interrupt
        self.accelerator, self.scale, self.bar = trainer.accelerator, 0.0, None
        self.checked = False

    def on_train_begin(self, args, state, control, **kwargs):
        done = {"total": state.max_steps, "initial": state.global_step}
        self.bar = tqdm(desc="train", unit="step", mininterval=2, disable=not processes.is_first(), **done)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.accelerator.scaler is not None:
            self.scale = self.accelerator.scaler.get_scale()
        # Warm-up starts at a rate of zero, so B leaves zero in the second applied update; A's gradient is
        # zero while B is. With a scaler (fp16) gradients may overflow here: look at the next step's.
        due = self.counts.applied >= 2 and not self.checked
        if due and all(p.grad.norm().isfinite() for p in model.parameters() if p.grad is not None):
            self.checked = True
            all_matrices_learn(self.guards, model)

    def on_optimizer_step(self, args, state, control, **kwargs):
        # The scaler lowers its scale when it skips an update. (accelerate's optimizer_step_was_skipped is
        # always False with a fused optimizer, whose kernel does the skipping.)
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() >= self.scale > 0:
            self.counts.applied += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)
        if args.use_cpu and state.global_step % 20 == 0:
            return_freed_memory()
        # Ctrl-C reaches several processes at different steps: here they agree.
        self.interrupt.agreed = processes.added_up([self.interrupt.asked], args.device)[0] > 0
        if self.interrupt.agreed:
            control.should_save = control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        check_step(self.guards, logs, state.global_step, self.accelerator.scaler is not None)
        took = self.counts.measured()
        rate = took["real_tokens"] / took["seconds"]
        self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, {rate:.0f} tokens/s")

    def close(self) -> None:
        if self.bar:
            self.bar.close()
