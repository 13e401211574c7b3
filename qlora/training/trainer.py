"""What HF's Trainer lacks: batches by length, checkpoints that are complete or absent, Ctrl-C."""

import contextlib
import json
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback

from config import PAD_MULTIPLE
from qlora import processes
from qlora.batches import BLANK, BLANK_PAIR, LengthBatches, collate, in_pairs
from qlora.cli import UserError, note
from qlora.files import discard, publish, scratch, seal
from qlora.hardware import peak_memory_bytes, restart_cuda_peak, return_freed_memory
from qlora.live_bytes import StepPeak
from qlora.training import trackers, watching
from qlora.training.checkpoints import MEASURED, discard_old, last_complete, step_of
from qlora.training.guards import Guards, all_matrices_learn, check_step
from qlora.training.preferences import real_pairs
from qlora.training.run_folder import Run


class Counts:
    """What training takes; in each checkpoint as measured.json, so that a resumed run reports all of it.

    (transformers' include_num_input_tokens_seen needs an attention mask to leave padding out; there is none.)
    """

    def __init__(self, run_started: float, device: str):
        self.processes, self.real_tokens, self.applied, self.earlier = 1, 0, 0, {}
        self.scoring_seconds = 0.0  # of held-out rows between steps: no part of training's seconds
        self.run_started, self.train_started = run_started, time.perf_counter()
        self.device, self.peak = device, StepPeak(device)  # peak: of tensors, in a training step

    def measured(self) -> dict:
        now, before = time.perf_counter(), self.earlier
        return {
            "processes": self.processes,
            "run_seconds": now - self.run_started + before.get("run_seconds", 0),
            "seconds": now - self.train_started - self.scoring_seconds + before.get("seconds", 0),
            "scoring_seconds": self.scoring_seconds + before.get("scoring_seconds", 0),
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
    """HF's Trainer with batches by length, staged checkpoints, counts of unpadded tokens and live bytes.

    `held_out` scores a few rows between steps (--eval-steps) and says which step was best.
    """

    def __init__(self, model, args, train_dataset: list[dict], base, run: Run, guards: Guards, held_out=None):
        self.guards, self.run, self.counts = guards, run, Counts(run.started, args.device.type)
        self.interrupt, self._staging = Interrupt(), None
        self.held_out: watching.HeldOut | None = held_out
        collator = partial(collate, pad_id=base.tokenizer.pad_token_id, multiple=PAD_MULTIPLE)
        blank = BLANK
        if "reference" in train_dataset[0]:  # preferences: a row is a pair
            train_dataset, blank = in_pairs(train_dataset), BLANK_PAIR
        if processes.count() > 1:
            train_dataset = [*train_dataset, blank]
        tokenizer = {"eval_dataset": [], "processing_class": base.tokenizer}  # evaluate() has rows of its own
        super().__init__(model, args, collator, train_dataset, **tokenizer)
        self.watch = Watch(self)
        self.add_callback(self.watch)
        self.remove_callback(PrinterCallback)

    def train_or_resume(self) -> dict:
        """Train from the last complete checkpoint, or from the start; returns what it took, see Counts.

        Raises KeyboardInterrupt, which says how to continue, after Ctrl-C; the state is saved then.
        """
        with self.interrupt:
            checkpoint = last_complete(self.run.out, self.keeps_best) if processes.is_first() else None
            checkpoint = processes.told_by_first(checkpoint)
            if checkpoint:
                note(f"resuming from {checkpoint}")
            try:
                if not (checkpoint and self._restore(checkpoint)):
                    done = step_of(checkpoint) if checkpoint else 0
                    with trackers.logging_into(self, self.run.out, done):
                        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                self.watch.close()  # an error message starts on a line of its own
        if self.interrupt.asked or self.interrupt.agreed:
            step = self.state.global_step
            raise KeyboardInterrupt(f"saved at step {step}; continue with: {self.run.resume_command}")
        measured = self.counts.measured()
        self._go_back_to_best()
        return measured

    @property
    def keeps_best(self) -> bool:
        return self.held_out is not None and self.held_out.keeps_best

    def _go_back_to_best(self) -> None:
        """Take the adapter of the step with the lowest held-out loss, where that is what shall be saved."""
        best, last = watching.best_step(self.state.log_history), self.state.global_step
        if not self.held_out or best in (None, last):
            return
        lowest = f"held-out loss was lowest at step {best} of {last}"
        if not self.keeps_best:
            note(f"note       {lowest}; saved is the last one: --early-stopping N would save that one")
            return
        checkpoint = self.run.out / f"checkpoint-{best}"
        if damage := watching.damage_of(checkpoint):
            raise UserError(f"{lowest}, but {damage}; train it again with: {self.run.resume_command}")
        self._load_from_checkpoint(str(checkpoint))
        note(f"best       {lowest}: that step's adapter is saved")

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
        stopped = self.held_out is not None and self.held_out.is_over(state.log_history)
        if state.global_step < state.max_steps and not stopped:
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

    def evaluate(self, *args, **kwargs) -> dict:
        """Score the held-out rows; what the Trainer asks for every --eval-steps and after the last step."""
        started = time.perf_counter()
        metrics = self.held_out.measure(self.model)
        if self.args.device.type == "cuda":
            restart_cuda_peak()  # what scoring took is no training step's
        self.counts.scoring_seconds += time.perf_counter() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.keeps_best:
            history = self.state.log_history
            self.control.should_training_stop |= self.held_out.is_over(history)
            is_best = watching.best_step(history) == self.state.global_step
            self.control.should_save |= is_best or self.control.should_training_stop
        return metrics

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
        discard_old(out, self.state.global_step, self.state.log_history if self.keeps_best else None)


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
        if "eval_loss" in logs and processes.is_first():
            right = f", accuracy {100 * logs['eval_accuracy']:.1f}%" if "eval_accuracy" in logs else ""
            tqdm.write(
                f"held out   step {state.global_step}: loss {logs['eval_loss']:.3f}{right}", sys.stderr
            )
        if "loss" not in logs:
            return
        check_step(self.guards, logs, state.global_step, self.accelerator.scaler is not None)
        took = self.counts.measured()
        rate = took["real_tokens"] / took["seconds"]
        self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, {rate:.0f} tokens/s")

    def close(self) -> None:
        if self.bar:
            self.bar.close()
