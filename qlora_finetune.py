"""Fine-tune LoRA adapters on a 4-bit model, and measure what they changed.

    python qlora_finetune.py                                    # IMDB, the model that fits this machine
    python qlora_finetune.py --samples 8000 --max-length 512 --eval-samples 2000 --output-dir long-run

Writes into --output-dir (qlora-out): the adapter in PEFT's format, its prompt (qlora.json), report.json,
report.md, curves.png and a model card. Then: python qlora_inference.py "your review"
Flags as TRL, Axolotl and others spell them are understood: docs/coming-from.md
"""

import contextlib
import dataclasses
import shlex
from collections.abc import Sequence
from datetime import datetime

from config import FIND_LR_ROWS, LORA_VARIANTS, MAX_GRAD_NORM, TrainSettings
from qlora import processes, publishing
from qlora.cli import note, parse, require, run
from qlora.training import flags, trackers
from qlora.training.run_folder import open_run, saved_settings


def read_settings(argv: Sequence[str] | None) -> TrainSettings:
    """Flags -> checked settings; with --resume, the earlier run's settings are the defaults."""
    processes.read_environment()
    s = parse(TrainSettings, argv, __doc__)
    if s.resume and (earlier := saved_settings(s.output_dir, TrainSettings)):
        s = parse(TrainSettings, argv, __doc__, default=earlier)
    return flags.checked(s)


def import_libraries() -> None:
    """The only late imports: they take seconds, so the flags are checked first."""
    global BitsAndBytesConfig, LoraConfig, TrainingArguments, get_peft_model, set_seed, torch
    global adapters, batches, data, fast, files, guards, hardware, hub, loading, lora, packed, plan, prompts
    global example_packs, forgetting, initial, preferences, preview, qat, rates, report, scoring, shapes
    global sharding, sources, splitting, training_rows, variants, watching, BeforeAfter, QLoRATrainer
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, TrainingArguments, set_seed

    from qlora import (
        adapters,
        batches,
        data,
        example_packs,
        fast,
        files,
        hardware,
        hub,
        loading,
        lora,
        packed,
        prompts,
        qat,
        scoring,
        shapes,
        sources,
        splitting,
        variants,
    )
    from qlora.memory import plan
    from qlora.training import (
        forgetting,
        guards,
        initial,
        preferences,
        preview,
        rates,
        report,
        sharding,
        training_rows,
        watching,
    )
    from qlora.training.before_after import BeforeAfter
    from qlora.training.trainer import QLoRATrainer


def main(argv: Sequence[str] | None = None) -> None:
    settings = read_settings(argv)
    if settings.test:
        import_libraries()
        return scoring.score_run(settings)
    if settings.preview:
        import_libraries()
        settings = dataclasses.replace(settings, lane="fp32")  # no trial of lanes
        s, _ = choose_model(initial.with_its_base(settings, initial.read(settings)))
        return preview.show(s, *training_rows.choose_rows(s, False))
    with open_run(settings) as run:
        publishing.check(settings)
        if run.has_nothing_to_do():
            note(f"{run.out} holds a complete run; nothing to do (--overwrite trains again)")
        else:
            import_libraries()
            train(run)
        publishing.push_adapter(settings, run.out, run.resume_command)


def train(run) -> None:
    """The whole job, in the order in which it happens."""
    old = initial.read(run.settings)  # the adapter that the run goes on from
    s, machine = choose_model(initial.with_its_base(run.settings, old), run.dtype)
    s = dataclasses.replace(s, run_name=s.run_name or trackers.default_name(s))
    revision = run.revision or initial.revision_of_base(s, old)
    variants.check_variant(s.lora_variant, s.precision)
    with processes.first_goes_first():  # the others find what it fetched
        rows, held_out, found = training_rows.choose_rows(s, run.older)
        if processes.count() > 1:
            sources.locate(s.model, revision)
    if s.find_lr:
        rows = splitting.evenly(rows, FIND_LR_ROWS)
    s = dataclasses.replace(s, samples=len(rows), eval_samples=len(held_out))  # what None stood for
    talks, pairs = found.kind in ("chat", "pairs"), found.kind == "pairs"
    known = not (talks or s.packing)  # how many tokens of a row are trained on
    predicted = plan.predict_run(s, machine) if known else None

    # 1. The frozen base, its linear layers in 4 bits. (load_in_4bit alone would mean fp4.)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # the block constants are quantized too: 4.127 instead of 4.5 bits
        bnb_4bit_compute_dtype=machine.dtype,
        # Sharded (FSDP), the packed weights have to look like the others of their layer.
        bnb_4bit_quant_storage=machine.dtype if processes.is_sharded() else torch.uint8,
    )
    nf4 = four_bit if s.precision == "nf4" else None  # other precisions: the table in config.py
    base = loading.load_base(s.model, s.precision, machine, revision, nf4)
    most = base.context_length
    require(s.max_length <= most, f"--max-length {s.max_length}: {s.model} reads at most {most} tokens")
    lora.refuse_broken_dora(base.model, s.lora_variant)
    note(f"weights    {base.model.get_memory_footprint() / 1e6:.0f} MB as {s.precision}")
    prompt = prompts.choose_format(s.objective, found.kind, found.answers, s.max_length, s.question)
    if talks:
        prompt = prompts.with_thoughts(prompt, rows)
    examples = batches.encode_rows(base.tokenizer, prompt, rows, "training")
    filled = example_packs.pack(examples, s.max_length, s.seed) if s.packing else examples
    if not known:
        predicted = plan.predict_run(s, machine, labels=batches.most_labels(filled))
    batches.show_labels(base.tokenizer, examples[0])
    healthy = guards.Guards()
    guards.check_data(healthy, base.tokenizer, prompt, examples)
    scored = (base, prompt, held_out)
    comparison = preferences.PairScores(*scored, examples, s.beta) if pairs else BeforeAfter(*scored)

    # 2. Small trainable matrices beside the frozen ones. PEFT freezes the base by itself;
    # prepare_model_for_kbit_training would also copy the embeddings to fp32, several times the adapters.
    targets = lora.resolve_targets(base.model, s.target_modules)
    variants.check_rank(base.model, targets, s.lora_variant, s.lora_r)
    set_seed(s.seed)  # draws A
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=s.lora_r,
        lora_alpha=s.lora_alpha or 2 * s.lora_r,
        lora_dropout=s.lora_dropout,
        target_modules=targets,
        **LORA_VARIANTS[s.lora_variant].options,
    )
    model = get_peft_model(base.model, qat.register(config, s.qat))
    qat.use_grid(model, "default", s.qat)
    # What LoraConfig leaves to others.
    start = initial.begin(model, base, old, s) if old else variants.begin(model, base, examples, s)
    lora.show_trainable(model)
    if processes.is_sharded():
        sharding.shard_base(model, machine.own_device)
    if s.gradient_checkpointing:
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    note(f"kernels    {fast.make_fast(model, machine.lane)}")
    if s.packing:
        example_packs.refuse_leaks(model, examples, machine.autocast)
    if pairs:
        preferences.use_dpo(model, s.beta)

    if s.find_lr:
        rates.show_rates(s, model, comparison, filled, lambda s: training_arguments(s, machine))
        return

    # 3. All flags have proved possible: the folder may change. What can the base do? Then train.
    run.begin(s, machine.dtype, model)
    before = comparison.score_before(run, model, rows, start)
    frozen = guards.check_start(healthy, model, examples, machine.autocast, start)
    arguments, held_out = training_arguments(s, machine), watching.of_run(s, comparison)
    trainer = QLoRATrainer(model, arguments, filled, base, run, healthy, held_out)
    measured = trainer.train_or_resume()
    guards.check_training(healthy, [step["loss"] for step in trainer.history], measured["applied_updates"])

    # 4. Save; score the same rows again; write the record. (Of several processes the first writes.)
    with files.scratch(run.out) if processes.is_first() else contextlib.nullcontext() as aside:
        aside = processes.told_by_first(aside)
        if processes.is_first():
            save_adapter(aside, model, base, prompt, (s, start, old))
        processes.wait()
        guards.check_end(healthy, model, examples, machine.autocast, (aside, frozen, start))
        processes.wait()
        if processes.is_first():
            files.publish_sealed(aside, run.out)
    processes.wait()
    note(f"guards     all {len(healthy.results)} held")
    chosen_on = held_out.chooses_on if held_out else 0
    evaluation = comparison.score_after(model, before, chosen_on)
    forgotten = forgetting.compare(base, model, before["forgetting"])
    if not processes.is_first():
        return
    lora_size = report.lora_section(model)
    weights_bytes = base.model.get_memory_footprint() - lora_size["bytes"]
    record = {
        "environment": hardware.environment(machine),
        "name": s.run_name,
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
        "settings": report.settings_section(s),
        "base": dataclasses.asdict(base.info),
        "data": report.data_section(found, examples, evaluation["rows"]),
        "lora": lora_size,
        "memory": report.memory_section(machine.device, measured, predicted, weights_bytes),
        "train": report.train_section(measured, trainer.history),
        "during_training": watching.section(
            held_out, trainer.state, s.eval_steps, measured["scoring_seconds"]
        ),
        "evaluation": evaluation,
        "forgetting": forgotten,
        "guards": healthy.results,
        "seconds": trainer.counts.measured()["run_seconds"],
    }
    report.write_report(run.out, record, trainer.history)
    report.show_result(record)
    took = f"{record['seconds'] / 60:.1f} minutes in all"
    note(f"\nwritten    {run.out}/: adapter, report.md, report.json, curves.png ({took})")
    adapter = "" if str(run.out) == "qlora-out" else f" --adapter {shlex.quote(str(run.out))}"
    note(f'next       python qlora_inference.py{adapter} "Type a review of your own here."')


def choose_model(s: TrainSettings, began: str | None = None):
    """(settings with the model and precision that `auto` stands for, hardware)

    `began`: the dtype in which a run to be resumed computed.
    """
    precision, config = s.precision, shapes.peek(s.model)
    sizes = shapes.widths(config)
    if precision == "auto" and s.model.lower().endswith(".gguf"):  # its own values
        precision = hardware.precision_of(hardware.detect("nf4", s.device, s.lane, sizes).dtype)
    elif precision == "auto":
        precision = shapes.stored_precision(config)
    machine = hardware.as_it_began(hardware.detect(precision, s.device, s.lane, sizes), began)
    hardware.show(machine, computes=not s.preview)
    processes.meet(machine.device)
    machine = hardware.like_the_first(machine)
    whole = f"--precision {precision}: its codes are no parameters that could be sharded (FSDP); use DDP"
    require(not (processes.is_sharded() and precision in packed.METHODS), whole)
    s, model, why = dataclasses.replace(s, precision=precision), s.model, "given"
    if model == "auto":
        model, why = hub.or_ungated(*plan.default_model(machine, plan.training_job(s, machine)))
    note(f"model      {model} ({why}), {precision}")
    return dataclasses.replace(s, model=model, lane=machine.lane or s.lane), machine


def training_arguments(s: TrainSettings, machine):
    arguments = TrainingArguments(
        output_dir=str(s.output_dir),
        per_device_train_batch_size=s.batch_size,
        gradient_accumulation_steps=s.grad_accum,
        num_train_epochs=s.epochs,
        max_steps=s.max_steps,
        learning_rate=s.learning_rate,
        lr_scheduler_type="linear",  # to zero: the last batches settle the adapter
        warmup_steps=0.05,  # a share of all steps: Adam's second moment is noise in the first ones
        weight_decay=0.0,  # LoRA's rank is the regularizer already
        max_grad_norm=MAX_GRAD_NORM,
        bf16=machine.device == "cuda" and machine.dtype == torch.bfloat16,
        fp16=machine.device == "cuda" and machine.dtype == torch.float16,  # brings the gradient scaler
        use_cpu=machine.device == "cpu",
        seed=s.seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the default logs 0 for a NaN loss; the guards want to see it
        save_steps=s.save_steps,
        remove_unused_columns=False,
        eval_strategy="steps" if s.eval_steps else "no",
        eval_steps=s.eval_steps,
        run_name=s.run_name,
        project=trackers.PROJECT,
        report_to=trackers.prepare(s, s.output_dir),
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # every matrix takes part in every step
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # more means DataParallel: the model on all GPUs at each step
    return arguments


def save_adapter(folder, model, base, prompt, run: tuple) -> None:
    """Adapter, tokenizer and prompt; `run`: its settings, how the adapter began, and from which one."""
    s, start, old = run
    # A local path means nothing elsewhere: name the base as others can find it.
    model.peft_config["default"].base_model_name_or_path = base.info.public_name
    variants.save(model, folder, start)
    base.tokenizer.save_pretrained(folder)
    rows = {"seed": s.seed, "eval_samples": s.eval_samples, "samples": s.samples}
    rows |= {"kind": "pairs"} if s.objective == "preference" else {}
    rows |= {"columns": s.columns} if s.columns else {}
    earlier = list(old.all_rows) if old else None
    dataset = {**data.identity(s.dataset), **rows}
    adapters.save_notes(folder, prompt, base.info, dataset, qat=s.qat, earlier=earlier)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's blank model card; ours comes with the report


if __name__ == "__main__":
    run(main)
