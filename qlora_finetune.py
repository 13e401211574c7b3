"""Fine-tune LoRA adapters on a 4-bit model, and measure what they changed.

    python qlora_finetune.py                                    # IMDB, the model that fits this machine
    python qlora_finetune.py --samples 8000 --max-length 512 --eval-samples 2000 --output-dir long-run

Writes into --output-dir (qlora-out): the adapter in PEFT's format, its prompt (qlora.json), report.json, report.md,
curves.png and a model card. Then: python qlora_inference.py "your review"
"""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from functools import partial
from typing import Sequence

from config import LR_SCHEDULER, MAX_GRAD_NORM, NAMED_ADAPTERS, PAD_MULTIPLE, WARMUP_RATIO, WEIGHT_DECAY, TrainSettings
from qlora.cli import UsageError, note, parse, require, run
from qlora.runs import begin, before_scores, claim, saved_settings, set_usual_modes


def read_settings(argv: Sequence[str] | None) -> TrainSettings:
    """Flags -> checked settings; with --resume, the earlier run's settings are the defaults."""
    settings, earlier = parse(TrainSettings, argv, __doc__), None
    if settings.resume and (earlier := saved_settings(settings.output_dir, TrainSettings)):
        settings = parse(TrainSettings, argv, __doc__, default=earlier)
    s = settings
    if s.target_modules in NAMED_ADAPTERS:
        modules, r = NAMED_ADAPTERS[s.target_modules]
        require(earlier or s.lora_r in (r, TrainSettings.lora_r), f"--target-modules {s.target_modules} means r {r}, --lora-r says {s.lora_r}: leave one out")
        s.target_modules, s.lora_r = modules, r
    require(s.samples > 0, f"--samples {s.samples}: at least 1 row is needed to train on")
    require(s.eval_samples > 0, f"--eval-samples {s.eval_samples}: at least 1 row is needed to score")
    require(0 < s.epochs < float("inf"), f"--epochs {s.epochs}: must be above 0")
    require(s.max_steps == -1 or s.max_steps > 0, f"--max-steps {s.max_steps}: -1 (off) or at least 1")
    require(s.max_length >= 8, f"--max-length {s.max_length}: at least 8 tokens")
    require(s.batch_size > 0, f"--batch-size {s.batch_size}: at least 1")
    require(s.grad_accum > 0, f"--grad-accum {s.grad_accum}: at least 1")
    require(s.save_steps > 0, f"--save-steps {s.save_steps}: at least 1")
    require(0 < s.learning_rate < 1, f"--learning-rate {s.learning_rate}: between 0 and 1")
    require(0 <= s.seed < 2**32, f"--seed {s.seed}: between 0 and 2**32 - 1")
    require(s.lora_r > 0, f"--lora-r {s.lora_r}: the rank must be at least 1")
    require(s.lora_alpha is None or s.lora_alpha > 0, f"--lora-alpha {s.lora_alpha}: must be above 0")
    require(0 <= s.lora_dropout < 1, f"--lora-dropout {s.lora_dropout}: at least 0, below 1")
    require(not (s.resume and s.overwrite), "--resume and --overwrite: take one of them")
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    settings = read_settings(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("several processes (accelerate launch, torchrun) are not supported yet; run it as one: python qlora_finetune.py")
    with claim(settings):
        if settings.resume and (settings.output_dir / "report.json").exists():
            note(f"{settings.output_dir} holds a complete run; nothing to do (--overwrite trains again)")
        else:
            train_and_report(settings)


def train_and_report(settings: TrainSettings) -> None:
    """The whole job, in the order in which it happens."""
    from qlora.before_after import score_after, score_before

    started = time.perf_counter()
    hardware = show_hardware(settings)
    train_rows, held_out, found = choose_rows(settings)
    predicted = predict_memory(settings, hardware, found)
    base = load(settings, hardware)
    prompt, train, held_out_examples = encode(settings, base, train_rows, held_out, found)
    guards = check_data(base, prompt, train)
    begin(settings)
    with resumable(settings):
        before = score_before(settings.output_dir, hardware, base, prompt, train_rows, held_out, held_out_examples)
        model = add_lora(settings, base)
        frozen = check_start(guards, settings, hardware, model, train)
        trainer, measured = fit(settings, base, hardware, model, train, guards, started)
        save_adapter(settings, base, model, prompt, guards, hardware, train, frozen)
        evaluation = score_after(hardware, base, model, prompt, held_out, held_out_examples, before)
        finish(settings, hardware, base, model, found, train, guards, trainer, measured, evaluation, predicted)


@contextlib.contextmanager
def resumable(settings: TrainSettings):
    """Ctrl-C says how to go on; fit() has its own words for it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or f"stopped; what was measured is kept, go on with: {resume_command(settings)}") from None


def resume_command(settings: TrainSettings) -> str:
    return f"python qlora_finetune.py --output-dir {shlex.quote(str(settings.output_dir))} --resume"


def show_hardware(settings: TrainSettings):
    from qlora.hardware import detect, show
    from qlora.loading import NAMES
    from qlora.plan import default_model, training_job

    if settings.precision == "auto":
        settings.precision = "nf4" if not settings.model.lower().endswith(".gguf") else NAMES[detect().dtype]
    hardware = detect(settings.precision)
    show(hardware)
    if settings.model == "auto":
        settings.model, why = default_model(hardware, training_job(settings, hardware, every_token=settings.objective == "lm"))
        note(f"model      {settings.model} (default: {why}), {settings.precision}")
    else:
        note(f"model      {settings.model} (given), {settings.precision}")
    return hardware


def choose_rows(settings: TrainSettings):
    from qlora.data import load_rows, split

    found = load_rows(settings.dataset)
    if found.kind == "text" and settings.objective == "sentiment":
        raise UsageError(f"--dataset {settings.dataset} has text but no labels: add --objective lm")
    if found.kind == "chat" and settings.objective == "lm":
        raise UsageError(f"--dataset {settings.dataset} holds conversations: leave --objective lm out (loss on the replies)")
    train_rows, held_out = split(found, settings.samples, settings.eval_samples, settings.seed)
    if settings.objective == "sentiment" and found.kind == "labels" and len({row.label for row in train_rows}) < 2:
        missing = f"take at least {len(found.answers)}" if settings.samples < len(found.answers) else "the others are all held out: lower --eval-samples"
        raise UsageError(f"--samples {settings.samples}: the rows drawn have one label only; {missing}")
    note(f"data       {found.origin}: {len(found.rows)} different rows ({found.duplicates_removed} duplicates removed), "
         f"{len(train_rows)} to train, {len(held_out)} held out")
    return train_rows, held_out, found


def predict_memory(settings: TrainSettings, hardware, found) -> dict | None:
    """What the widest training step will hold, counted on tensors without data; None where a model can't be planned."""
    from qlora.ledger import model_config
    from qlora.loading import first_line
    from qlora.memory import predict, predict_training
    from qlora.plan import capacity, training_job

    job = training_job(settings, hardware, every_token=settings.objective == "lm" or found.kind == "chat")
    try:
        predicted = predict(predict_training, model_config(settings.model)[0], job)
    except UsageError:
        raise
    except Exception as error:  # what does not build without data can be trained all the same
        note(f"memory     not predicted: {first_line(error)}")
        return None
    parts = ", ".join(f"{kind.replace('_', ' ')} {size / 1e9:.2f}" for kind, size in predicted.items() if kind != "peak" and size > 5e6)
    note(f"memory     {predicted['peak'] / 1e9:.2f} GB predicted in a training step ({parts})")
    if predicted["peak"] > capacity(hardware):
        note(f"           that is more than this machine's {capacity(hardware) / 1e9:.1f} GB: see python quant_llama32_4bit_lora.py --plan --model {settings.model}")
    return predicted


def load(settings: TrainSettings, hardware):
    from qlora.fast import speed_up_base
    from qlora.loading import context_length, load_base
    from qlora.lora import refuse_broken_dora, resolve_targets

    # The hub's main branch may have moved on since the run began.
    revision = before_scores(settings.output_dir).get("revision") if settings.resume else None
    base = load_base(settings.model, settings.precision, hardware, revision)
    if settings.max_length > context_length(base.model):
        raise UsageError(f"--max-length {settings.max_length}: {settings.model} reads at most {context_length(base.model)} tokens")
    refuse_broken_dora(base.model, settings.lora_variant)
    resolve_targets(base.model, settings.target_modules)  # a name that is not there is told now, not after scoring the base
    note(f"weights    {base.model.get_memory_footprint() / 1e6:.0f} MB as {settings.precision}")
    note(f"kernels    {speed_up_base(base.model)}")
    return base


def encode(settings: TrainSettings, base, train_rows, held_out, found):
    """(prompt format, training examples, held-out examples), and the label X-ray of the first row."""
    from qlora.encoding import choose_format, encode_rows, show_labels
    from qlora.logits import loss_at_labels

    prompt = choose_format(settings.objective, found.kind, found.answers, settings.max_length)
    train = encode_rows(base.tokenizer, prompt, train_rows, "training")
    held_out_examples = encode_rows(base.tokenizer, prompt, held_out, "held-out")
    show_labels(base.tokenizer, train[0])
    loss_at_labels(base.model)  # from here on the model's loss makes logits at labelled positions only
    return prompt, train, held_out_examples


def check_data(base, prompt, train):
    from qlora import guards as g
    from qlora.prompts import end_ids

    guards = g.Guards()
    g.labels_present(guards, train)
    if prompt.objective != "lm":  # plain text may be cut before its end
        g.end_supervised(guards, train, end_ids(base.tokenizer))
    return guards


def add_lora(settings: TrainSettings, base):
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from qlora.fast import speed_up_lora
    from qlora.ledger import short_ledger
    from qlora.lora import resolve_targets, show_trainable

    set_seed(settings.seed)  # draws A
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_r,
        lora_dropout=settings.lora_dropout,
        target_modules=resolve_targets(base.model, settings.target_modules),
        use_rslora=settings.lora_variant == "rslora",
        use_dora=settings.lora_variant == "dora",
    )
    # PEFT freezes the base. prepare_model_for_kbit_training is left out on purpose: it would also copy the
    # embedding to fp32, several times the size of the adapters.
    model = get_peft_model(base.model, config)
    if settings.gradient_checkpointing:
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    show_trainable(model)
    for line in short_ledger(model):
        note(f"           {line}")
    speed_up_lora(model)
    return model


def check_start(guards, settings: TrainSettings, hardware, model, train) -> str:
    from qlora import guards as g

    probe = g.probe_batch(model, train)
    g.starts_as_base(guards, model, probe["input_ids"], hardware.autocast, exact=settings.lora_variant != "dora")
    g.loss_is_models_own(guards, model, probe, hardware.autocast)
    g.nothing_repacked(guards, model, probe, hardware.autocast)
    return g.frozen_hash(model)


def fit(settings: TrainSettings, base, hardware, model, train, guards, started: float):
    """(the trainer, what training took, earlier processes included)"""
    import torch
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from qlora import guards as g
    from qlora.data import collate
    from qlora.training import Interrupt, QLoRATrainer, Watch, last_complete

    args = TrainingArguments(
        output_dir=str(settings.output_dir),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=LR_SCHEDULER,
        warmup_steps=WARMUP_RATIO,  # below 1: a share of all steps
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        bf16=hardware.device == "cuda" and hardware.dtype == torch.bfloat16,
        fp16=hardware.device == "cuda" and hardware.dtype == torch.float16,  # brings the gradient scaler
        use_cpu=hardware.device == "cpu",
        seed=settings.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the default replaces a NaN loss by 0 in the log; guards want to see it
        save_steps=settings.save_steps,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    with Interrupt() as interrupt:
        watch = Watch(guards, interrupt)
        trainer = QLoRATrainer(
            model=model, args=args, train_dataset=train, processing_class=base.tokenizer, callbacks=[watch],
            data_collator=partial(collate, pad_id=base.tokenizer.pad_token_id, multiple=PAD_MULTIPLE),
        )
        trainer.remove_callback(PrinterCallback)
        watch.trainer, trainer.guards = trainer, guards
        trainer.run_started, trainer.train_started = started, time.perf_counter()
        checkpoint = last_complete(settings.output_dir)
        if checkpoint:
            note(f"resuming from {checkpoint}")
        done = checkpoint and trainer.take_up(checkpoint)
        try:
            if not done:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if watch.bar:
                watch.bar.close()  # an error message starts on a line of its own
        measured = trainer.measured()
    if interrupt.asked:
        raise KeyboardInterrupt(f"saved at step {trainer.state.global_step}; go on with: {resume_command(settings)}")
    g.all_finite(guards, losses(trainer))
    if not any(r["name"] == "all_matrices_learn" for r in guards.results):
        note("note       guard 'all_matrices_learn' looks at a process's third update, which none reached")
    return trainer, measured


def losses(trainer) -> list[dict]:
    """[{step, loss, grad_norm, learning_rate, ...}], one for each optimizer step of the whole run."""
    return [logged for logged in trainer.state.log_history if "loss" in logged]


def save_adapter(settings: TrainSettings, base, model, prompt, guards, hardware, train, frozen: str) -> None:
    """Adapter, tokenizer and prompt; written aside, checked, then moved: a full disk leaves no half file, a guard no adapter."""
    from qlora import guards as g
    from qlora.adapters import save_notes
    from qlora.data import identity
    from qlora.training import staging

    g.base_unchanged(guards, frozen, model)
    # A local path means nothing elsewhere: name the base as others can find it.
    model.peft_config["default"].base_model_name_or_path = base.info.public_name
    with staging(settings.output_dir) as aside:
        model.save_pretrained(aside, save_embedding_layers=False)
        base.tokenizer.save_pretrained(aside)
        save_notes(aside, prompt, base.info, {**identity(settings.dataset), "seed": settings.seed, "eval_samples": settings.eval_samples, "samples": settings.samples})
        (aside / "README.md").unlink(missing_ok=True)  # PEFT's blank model card; ours comes with the report
        g.reloads_same(guards, model, aside, g.probe_batch(model, train)["input_ids"], hardware.autocast)
        set_usual_modes(aside)
        for path in aside.iterdir():
            os.replace(path, settings.output_dir / path.name)
    note(f"guards     {len(guards.results)} of {len(guards.results)} held")


def finish(settings, hardware, base, model, found, train, guards, trainer, measured, evaluation, predicted) -> None:
    """Write the record, show what matters of it, say what to do next."""
    from qlora import report as r

    history = losses(trainer)
    report = r.build_report(settings, hardware, base, model, found, train, guards, measured, history, evaluation, predicted, time.perf_counter() - trainer.run_started)
    r.write_report(settings.output_dir, report, history)
    r.show_result(report)
    out = settings.output_dir
    note(f"\nwritten    {out}/: adapter, report.md, report.json, curves.png ({report['seconds'] / 60:.1f} minutes in all)")
    adapter = "" if str(out) == "qlora-out" else f" --adapter {out}"
    note(f'next       python qlora_inference.py{adapter} "Type a review of your own here."')


if __name__ == "__main__":
    run(main)
