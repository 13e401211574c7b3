"""Fine-tune LoRA adapters on a 4-bit model, and measure what they changed.

    python qlora_finetune.py                                    # IMDB, the model that fits this machine
    python qlora_finetune.py --samples 8000 --max-length 512 --output-dir long-run

Writes into --output-dir (qlora-out): the adapter in PEFT's format, its prompt (qlora.json), report.json, report.md,
curves.png and a model card. Then: python qlora_inference.py "your review"
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import Sequence

from config import (FEW_SHOT, LR_SCHEDULER, MAX_GRAD_NORM, SENTIMENT_SYSTEM, SENTIMENT_USER, WARMUP_RATIO, WEIGHT_DECAY,
                    TrainSettings)
from qlora.cli import UsageError, note, parse, require, run
from qlora.runs import claim, saved_settings, write_json


def read_settings(argv: Sequence[str] | None) -> TrainSettings:
    """Flags -> checked settings; with --resume, the earlier run's settings are the defaults."""
    settings = parse(TrainSettings, argv, __doc__)
    if settings.resume and (earlier := saved_settings(settings.output_dir, TrainSettings)):
        settings = parse(TrainSettings, argv, __doc__, default=earlier)
    s = settings
    require(s.samples > 0, f"--samples {s.samples}: at least 1 row is needed to train on")
    require(s.eval_samples > 0, f"--eval-samples {s.eval_samples}: at least 1 row is needed to score")
    require(s.epochs > 0, f"--epochs {s.epochs}: must be above 0")
    require(s.max_steps == -1 or s.max_steps > 0, f"--max-steps {s.max_steps}: -1 (off) or at least 1")
    require(s.max_length >= 8, f"--max-length {s.max_length}: at least 8 tokens")
    require(s.batch_size > 0, f"--batch-size {s.batch_size}: at least 1")
    require(s.grad_accum > 0, f"--grad-accum {s.grad_accum}: at least 1")
    require(s.save_steps > 0, f"--save-steps {s.save_steps}: at least 1")
    require(0 < s.learning_rate < 1, f"--learning-rate {s.learning_rate}: between 0 and 1")
    require(s.lora_r > 0, f"--lora-r {s.lora_r}: the rank must be at least 1")
    require(s.lora_alpha is None or s.lora_alpha > 0, f"--lora-alpha {s.lora_alpha}: must be above 0")
    require(0 <= s.lora_dropout < 1, f"--lora-dropout {s.lora_dropout}: at least 0, below 1")
    require(not (s.resume and s.overwrite), "--resume and --overwrite: take one of them")
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    settings = read_settings(argv)
    if settings.resume and (settings.output_dir / "report.json").exists():
        note(f"{settings.output_dir} holds a complete run; nothing to do (--overwrite trains again)")
        return
    with claim(settings):
        train_and_report(settings)


def train_and_report(settings: TrainSettings) -> None:
    """The whole job, in the order in which it happens."""
    started = time.perf_counter()
    hardware = show_hardware(settings)
    train_rows, held_out, found = choose_rows(settings)
    base = load(settings, hardware)
    prompt, train, evaluate = encode(settings, base, train_rows, held_out, found)
    guards = check_data(base, train)
    before = score_base(settings, hardware, base, prompt, train_rows, held_out, evaluate)
    model = add_lora(settings, base)
    frozen = check_start(guards, settings, hardware, model, train)
    trainer, watch, seconds = fit(settings, hardware, base, model, train, guards)
    save_adapter(settings, base, model, prompt)
    check_end(guards, settings, hardware, model, train, frozen)
    evaluation = score_tuned(settings, hardware, base, model, prompt, held_out, evaluate, before)
    finish(settings, hardware, base, model, found, train, guards, trainer, watch, seconds, evaluation, started)


def show_hardware(settings: TrainSettings):
    from qlora.hardware import detect, environment
    from qlora.loading import default_model

    hardware = detect()
    env = environment(hardware)
    note(f"device     {hardware.name}, {hardware.memory_gib:.0f} GiB")
    note(f"dtype      {env['dtype']}: {hardware.why}")
    note(f"versions   python {env['python']}, torch {env['torch']}, transformers {env['transformers']}, "
         f"peft {env['peft']}, bitsandbytes {env['bitsandbytes']}")
    if settings.model == "auto":
        settings.model, why = default_model(hardware)
        note(f"model      {settings.model} (default: {why}), {settings.precision}")
    else:
        note(f"model      {settings.model} (given), {settings.precision}")
    return hardware


def choose_rows(settings: TrainSettings):
    from qlora.data import load_rows, split

    found = load_rows(settings.dataset)
    if found.kind != "labels" and settings.objective == "sentiment" and found.kind == "text":
        raise UsageError(f"--dataset {settings.dataset} has text but no labels: add --objective lm")
    if found.kind == "chat" and settings.objective == "lm":
        raise UsageError(f"--dataset {settings.dataset} holds conversations: leave --objective lm out (loss on the replies)")
    train_rows, held_out = split(found, settings.samples, settings.eval_samples, settings.seed)
    note(f"data       {found.origin}: {len(found.rows)} different rows ({found.duplicates_removed} duplicates removed), "
         f"{len(train_rows)} to train, {len(held_out)} held out")
    return train_rows, held_out, found


def load(settings: TrainSettings, hardware):
    from qlora.loading import context_length, load_base

    base = load_base(settings.model, settings.precision, hardware)
    if settings.max_length > context_length(base.model):
        raise UsageError(f"--max-length {settings.max_length}: {settings.model} reads at most {context_length(base.model)} tokens")
    note(f"weights    {base.model.get_memory_footprint() / 1e6:.0f} MB as {settings.precision}")
    return base


def encode(settings: TrainSettings, base, train_rows, held_out, found):
    """Rows -> token ids and labels, and the label X-ray of the first row."""
    from qlora import prompts as p

    objective = "lm" if settings.objective == "lm" else "sentiment" if found.kind == "labels" else "chat"
    prompt = p.PromptFormat(objective, settings.max_length)
    if objective == "sentiment":
        user = SENTIMENT_USER
        if found.answers != ("negative", "positive"):
            user = "{text}\n\nWhich label fits: " + ", ".join(found.answers) + "?"
        prompt = p.PromptFormat(objective, settings.max_length, SENTIMENT_SYSTEM if user is SENTIMENT_USER else "", user, found.answers)

    def example(row):
        if objective == "sentiment":
            return p.sentiment_example(base.tokenizer, prompt, row.text, row.label)
        if objective == "lm":
            return p.lm_example(base.tokenizer, row.text, settings.max_length)
        return p.chat_example(base.tokenizer, row.messages)

    def fitting(rows, what):
        made = [dict(zip(("input_ids", "labels"), example(row))) for row in rows]
        kept = [e for e in made if len(e["input_ids"]) <= settings.max_length]
        if not kept:
            raise UsageError(f"--max-length {settings.max_length}: no {what} row is that short (shortest: {min(len(e['input_ids']) for e in made)} tokens)")
        if len(kept) < len(made):
            note(f"note       {len(made) - len(kept)} {what} rows longer than --max-length {settings.max_length} left out")
        return kept

    train = fitting(train_rows, "training")
    evaluate = fitting(held_out, "held-out")
    show_labels(base.tokenizer, train[0])
    return prompt, train, evaluate


def show_labels(tokenizer, example: dict, edge: int = 6) -> None:
    """X-ray of one row: which tokens are read, and which are learned."""
    from qlora.prompts import IGNORE

    rows = list(zip(example["input_ids"], example["labels"]))
    learned = sum(label != IGNORE for _, label in rows)
    note(f"labels     first training row: {len(rows)} tokens, {learned} of them trained on (+), the rest only read (.)")
    shown = list(range(len(rows))) if len(rows) <= 4 * edge else [*range(edge), None, *range(len(rows) - 2 * edge, len(rows))]
    for i in shown:
        if i is None:
            note(f"             … {len(rows) - 3 * edge} more")
        else:
            note(f"           {'+' if rows[i][1] != IGNORE else '.'} {i:4d}  {rows[i][0]:6d}  {tokenizer.decode([rows[i][0]])!r}")


def check_data(base, train):
    from qlora import guards as g
    from qlora.prompts import end_ids

    guards = g.Guards()
    g.labels_present(guards, train)
    if any(label == -100 for label in train[0]["labels"]):  # lm rows may be cut before their end
        g.end_supervised(guards, train, end_ids(base.tokenizer))
    return guards


def score_base(settings: TrainSettings, hardware, base, prompt, train_rows, held_out, evaluate) -> dict:
    """What the untrained base can do on the held-out rows: kept in before.json, so that --resume need not repeat it."""
    import json

    from qlora import evaluation as e
    from qlora.logits import loss_at_labels

    loss_at_labels(base.model)
    kept = settings.output_dir / "before.json"
    if kept.exists():
        return json.loads(kept.read_text())
    if prompt.objective == "sentiment":
        answers = prompt.answers
        truth = [row.label for row in held_out]
        zero = label_scores(hardware, base, base.model, prompt, held_out, "base, zero-shot")
        before = {"scores": zero.tolist(), "base_zero_shot": e.accuracy_report(zero.argmax(1).tolist(), truth, answers)}
        if answers == ("negative", "positive"):
            few = label_scores(hardware, base, base.model, prompt, held_out, "base, few-shot", FEW_SHOT)
            before["base_few_shot"] = e.accuracy_report(few.argmax(1).tolist(), truth, answers)
        before["bag_of_words"] = e.accuracy_report(e.bag_of_words(train_rows, held_out), truth, answers)
    else:
        with progress(len(evaluate), "base, perplexity") as step:
            before = {"perplexity": e.perplexity(base.model, evaluate, hardware.autocast, step)}
    write_json(kept, before)
    return before


def label_scores(hardware, base, model, prompt, rows, title, examples=()):
    """log P(answer) of each row and answer, (rows, answers)"""
    from qlora import evaluation as e
    from qlora import prompts as p

    prompts = [p.sentiment_prompt(base.tokenizer, prompt, row.text, examples) for row in rows]
    answers = [p.answer_ids(base.tokenizer, prompt, label) for label in range(len(prompt.answers))]
    with progress(len(rows), title) as step:
        return e.score_labels(model, prompts, answers, hardware.autocast, step)


def progress(total: int, title: str):
    from contextlib import contextmanager

    from tqdm import tqdm

    @contextmanager
    def bar():
        with tqdm(total=total, desc=title, unit="row", mininterval=2, leave=True) as shown:
            yield shown.update

    return bar()


def add_lora(settings: TrainSettings, base):
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from qlora.lora import resolve_targets, show_trainable
    from qlora.fast import speed_up

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
    note(f"kernels    {speed_up(model)}")
    return model


def check_start(guards, settings: TrainSettings, hardware, model, train) -> str:
    from qlora import guards as g
    from qlora.data import collate

    probe = probe_batch(model, train)
    g.starts_as_base(guards, model, probe["input_ids"], hardware.autocast, exact=settings.lora_variant != "dora")
    g.loss_is_models_own(guards, model, probe, hardware.autocast)
    g.nothing_repacked(guards, model, probe, hardware.autocast)
    return g.frozen_hash(model)


def probe_batch(model, train) -> dict:
    """The two shortest training rows, on the model's device."""
    from qlora.data import collate

    device = next(model.parameters()).device
    batch = collate(sorted(train, key=lambda e: len(e["input_ids"]))[:2], 0)
    return {name: batch[name].to(device) for name in ("input_ids", "labels")}


def fit(settings: TrainSettings, hardware, base, model, train, guards):
    import torch
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

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
        warmup_steps=WARMUP_RATIO,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        bf16=hardware.dtype == torch.bfloat16,
        fp16=hardware.dtype == torch.float16,
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
            data_collator=partial(collate, pad_id=base.tokenizer.pad_token_id),
        )
        trainer.remove_callback(PrinterCallback)
        watch.trainer = trainer
        checkpoint = last_complete(settings.output_dir)
        if checkpoint:
            note(f"resuming from {checkpoint}")
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - started
    if interrupt.asked:
        raise KeyboardInterrupt(f"saved at step {trainer.state.global_step}; go on with: python qlora_finetune.py --output-dir {settings.output_dir} --resume")
    return trainer, watch, seconds


def save_adapter(settings: TrainSettings, base, model, prompt) -> None:
    from qlora.adapters import save_notes

    # A local path means nothing elsewhere: name the base as others can find it.
    model.peft_config["default"].base_model_name_or_path = base.info.public_name
    model.save_pretrained(settings.output_dir, save_embedding_layers=False)
    base.tokenizer.save_pretrained(settings.output_dir)
    save_notes(settings.output_dir, prompt, base.info, {"name": settings.dataset, "seed": settings.seed})


def check_end(guards, settings: TrainSettings, hardware, model, train, frozen: str) -> None:
    from qlora import guards as g

    g.base_unchanged(guards, frozen, model)
    g.reloads_same(guards, model, settings.output_dir, probe_batch(model, train)["input_ids"], hardware.autocast)
    note(f"guards     {len(guards.results)} of {len(guards.results)} held")


def score_tuned(settings: TrainSettings, hardware, base, model, prompt, held_out, evaluate, before) -> dict:
    import numpy as np

    from qlora import evaluation as e

    if prompt.objective != "sentiment":
        with progress(len(evaluate), "tuned, perplexity") as step:
            after = e.perplexity(model, evaluate, hardware.autocast, step)
        return {"rows": len(evaluate), "perplexity": {"before": before["perplexity"], "after": after}}
    truth = [row.label for row in held_out]
    tuned = label_scores(hardware, base, model, prompt, held_out, "tuned")
    changed = e.flips(np.array(before["scores"]), tuned, truth)
    word = prompt.answers.__getitem__
    examples = []
    for kind, i in [*(("fixed", i) for i in changed["fixed"][:2]), *(("broken", i) for i in changed["broken"][:1])]:
        was, now = int(np.argmax(before["scores"][i])), int(tuned[i].argmax())
        examples.append({"kind": kind, "truth": word(truth[i]), "before": word(was), "after": word(now),
                         "text": held_out[i].text if len(held_out[i].text) <= 300 else "… " + held_out[i].text[-300:]})
    return {
        "rows": len(held_out),
        **{k: v for k, v in before.items() if k != "scores"},
        "tuned": e.accuracy_report(tuned.argmax(1).tolist(), truth, prompt.answers),
        "flips": {"fixed": len(changed["fixed"]), "broken": len(changed["broken"]), "examples": examples},
    }


def finish(settings, hardware, base, model, found, train, guards, trainer, watch, seconds, evaluation, started) -> None:
    """Write the record, show what matters of it, say what to do next."""
    import dataclasses

    from qlora import report as r
    from qlora.hardware import environment, peak_memory_bytes
    from qlora.prompts import IGNORE

    trainable, total = model.get_nb_trainable_parameters()
    losses = [h["loss"] for h in watch.history] or [float("nan")]
    report = {
        "environment": environment(hardware),
        "settings": {k: str(v) if k == "output_dir" else v for k, v in dataclasses.asdict(settings).items()},
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
                 "bytes": sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)},
        "memory": {"predicted_peak_bytes": None, "measured_peak_bytes": peak_memory_bytes(hardware.device),
                   "what": "process, resident" if hardware.device == "cpu" else "CUDA allocator",
                   "weights_bytes": base.model.get_memory_footprint()},
        "train": {"steps": trainer.state.global_step, "seconds": seconds, "real_tokens": trainer.real_tokens,
                  "tokens_per_second": trainer.real_tokens / seconds,
                  "loss_first": sum(losses[:10]) / len(losses[:10]), "loss_last": sum(losses[-10:]) / len(losses[-10:])},
        "evaluation": evaluation,
        "guards": guards.results,
        "seconds": time.perf_counter() - started,
    }
    r.write_report(settings.output_dir, report, watch.history)
    show_result(settings, report)


def show_result(settings, report) -> None:
    from qlora import report as r

    train, memory, evaluation = report["train"], report["memory"], report["evaluation"]
    note(f"training   {train['steps']} steps, {train['seconds']:.0f} s, {train['tokens_per_second']:.0f} real tokens/s, "
         f"loss {train['loss_first']:.2f} -> {train['loss_last']:.2f}, peak memory {memory['measured_peak_bytes'] / 1e9:.2f} GB ({memory['what']})")
    if "tuned" in evaluation:
        note()
        print(f"accuracy on the same {evaluation['rows']} held-out rows, with 95% interval")
        for who, accuracy, interval in r.accuracy_table(evaluation):
            print(f"  {who:22} {accuracy:>6}   {interval}")
        flips = evaluation["flips"]
        print(f"  {flips['fixed']} rows put right, {flips['broken']} broken; for example")
        for example in flips["examples"]:
            tail = " ".join(example["text"][-160:].split())
            print(f"  {example['kind']}: {example['before']} -> {example['after']} (truth {example['truth']}): … {tail}")
    else:
        p = evaluation["perplexity"]
        print(f"perplexity on {evaluation['rows']} held-out rows: {p['before']['perplexity']:.2f} before, {p['after']['perplexity']:.2f} after")
    out = settings.output_dir
    note(f"\nwritten    {out}/: adapter, report.md, report.json, curves.png ({report['seconds'] / 60:.1f} minutes in all)")
    adapter = "" if str(out) == "qlora-out" else f" --adapter {out}"
    note(f'next       python qlora_inference.py{adapter} "Type a review of your own here."')


if __name__ == "__main__":
    run(main)
