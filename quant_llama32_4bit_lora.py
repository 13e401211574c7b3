"""See what 4 bits do to a Llama, what LoRA adds, and what fits into memory, before training anything.

    python quant_llama32_4bit_lora.py                                    # every part, about two minutes
    python quant_llama32_4bit_lora.py --plan --model llama-3.1-8b        # one part; needs no weights
    python quant_llama32_4bit_lora.py --compare nf4 bf16 torchao-int8wo  # precisions side by side

Writes quantization.json and pictures into --output-dir (quant-out). Next: python qlora_finetune.py
"""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

from config import COMPARABLE, LORA_VARIANTS, DemoSettings
from qlora.cli import UserError, note, parse, require, run
from qlora.files import read_json, write_json

PARTS = {  # in the order of the lesson
    "architecture": "Architecture: what is quantized and what is not",
    "untrained": "Untrained LoRA: A is random, B is zero",
    "sampling": "Sampling: temperature, top-k, top-p",
    "datatypes": "Data types: what each stores and gives back",
    "ledger": "LoRA ledger: what an adapter adds",
    "plan": "Will it fit?",
    "compare": "Precisions side by side",
}
NEED_MODEL = {"architecture", "untrained", "sampling"}  # the others load what they need, or no weights at all
COURSE_MODEL = "llama-3.2-3b"  # its figures are quoted in many courses


def read_settings(argv: Sequence[str] | None) -> DemoSettings:
    s = parse(DemoSettings, argv, __doc__)
    require(s.prompt.strip() != "", "--prompt: is empty")
    known = ", ".join(COMPARABLE)
    for name in s.compare or ():
        require(name in COMPARABLE, f"--compare {name}: no such precision; choose from {known}")
    require(s.adapter is None or "ledger" in chosen_parts(s), "--adapter: only --ledger reads it")
    variant = LORA_VARIANTS[s.lora_variant]
    as_lora = variant.start in ("base", "nearly") and not variant.reads_rows
    shows = f"--untrained shows how lora, rslora and dora begin, not {s.lora_variant}; name other parts"
    require(as_lora or "untrained" not in chosen_parts(s), f"--lora-variant {s.lora_variant}: {shows}")
    earlier_results(s.output_dir)
    return s


def chosen_parts(settings: DemoSettings) -> list[str]:
    """The parts whose flags were given; all of them if none was. `--compare` alone is an empty tuple."""
    return [part for part in PARTS if getattr(settings, part) not in (None, False)] or list(PARTS)


def earlier_results(out: Path) -> dict:
    """What earlier runs left in quantization.json; raises UserError if this run could not write its own."""
    above = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    require(above.is_dir(), f"--output-dir {out}: {above} is a file; name a folder")
    require(os.access(above, os.W_OK), f"--output-dir {out}: {above} is not writable")
    path = out / "quantization.json"
    return read_json(path, "move it away") if path.exists() else {}


def import_libraries() -> None:
    """The only late imports: they take seconds, and --help and typos are answered before."""
    global BitsAndBytesConfig, LoraConfig, load_base, adapters, hardware, hub, lora, shapes, weights
    global compare, compare_pictures, datatypes, ledger, outline, sampling, untrained, plan, step
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from qlora import adapters, hardware, hub, lora, shapes, weights
    from qlora.lab import compare, compare_pictures, datatypes, ledger, outline, sampling, untrained
    from qlora.loading import load_base
    from qlora.memory import plan, step


def main(argv: Sequence[str] | None = None) -> None:
    asked = read_settings(argv)
    import_libraries()
    settings, machine = choose_model(asked)
    save(settings, machine, lesson(settings, machine))


def lesson(s: DemoSettings, machine) -> dict:
    """Every part that was asked for, in order; returns their results."""
    parts, out, results = chosen_parts(s), s.output_dir, {}
    if NEED_MODEL & set(parts):
        # load_in_4bit=True alone would mean fp4, products in fp32 and no double quantization.
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=machine.dtype,
        )
        started, chosen = time.perf_counter(), four_bit if s.precision == "nf4" else None
        base = load_base(s.model, s.precision, machine, quantization=chosen)
        results["load"] = show_size(base, time.perf_counter() - started)
    if begin("architecture", parts):
        results["architecture"] = outline.show_outline(base.model)
    if begin("untrained", parts):
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=s.lora_r,
            lora_alpha=s.lora_alpha or 2 * s.lora_r,
            lora_dropout=s.lora_dropout,
            target_modules=lora.resolve_targets(base.model, s.target_modules),
            **LORA_VARIANTS[s.lora_variant].options,
        )
        results["untrained"] = untrained.show_untrained(base, config, s.prompt, s.seed)
    if begin("sampling", parts):
        results["sampling"] = sampling.show_sampling(base, s.prompt, s.seed)
        sampling.draw_distribution(out / "next_token.png", results["sampling"])
    base = None  # what follows loads what it needs, into free memory
    if begin("datatypes", parts):
        sixteen_bit = load_base(s.model, "fp32" if s.precision == "fp32" else "bf16", machine)
        results["datatypes"] = datatypes.show_datatypes(sixteen_bit, out / "levels.png")
        del sixteen_bit
    if begin("ledger", parts):
        results["ledger"] = show_ledger(s, machine)
    if begin("plan", parts):
        results["plan"] = show_plan(s, machine)
    if begin("compare", parts):
        calibration = s.calibration_rows, s.calibration_length, s.group_size
        results["compare"] = compare.compare(
            s.model, s.compare, s.eval_samples, s.seed, s.device, calibration
        )
        compare_pictures.draw_sizes(out / "precisions.png", results["compare"]["rows"])
        if errors := results["compare"]["errors"]:
            compare_pictures.draw_errors(out / "errors.png", errors)
    return results


def choose_model(asked: DemoSettings):
    """(settings with a model, hardware); raises UserError for what a chosen part could not work with."""
    if asked.precision == "auto":
        stored = shapes.stored_precision(shapes.peek(asked.model))
        asked = dataclasses.replace(asked, precision=stored)
    machine = hardware.detect(asked.precision, asked.device, asked.lane)
    hardware.show(machine)
    model, why = asked.model, "given"
    if model == "auto":
        model, why = plan.default_model(machine, plan.training_job(asked, machine))
        if set(chosen_parts(asked)) - {"plan", "ledger"}:  # those read no weights
            model, why = hub.or_ungated(model, why)
    note(f"model      {model} ({why})")
    if "plan" in chosen_parts(asked):
        step.refuse_other_kinds(shapes.model_config(model)[0])
    if asked.adapter and adapters.read_adapter(asked.adapter).base is None:
        missing = "no qlora.json in it, so the base and the precision that it was trained on are unknown"
        raise UserError(f"--adapter {asked.adapter}: {missing}")
    return dataclasses.replace(asked, model=model), machine


def begin(part: str, parts: Sequence[str]) -> bool:
    """Whether `part` was asked for; if so, its title is printed."""
    if part in parts:
        print(f"\n{PARTS[part]}\n{'=' * len(PARTS[part])}")
    return part in parts


def show_size(base, seconds: float) -> dict:
    """Bytes of the loaded model, and what 16 bits would take."""
    full = shapes.skeleton(base.model.config)
    before, parameters = full.get_memory_footprint(), full.num_parameters()
    after = weights.held_bytes(base.model.modules())  # get_memory_footprint() leaves out the block constants
    print(f"\n{base.info.name}: {parameters:,} parameters, loaded in {seconds:.1f} s")
    for precision, size in (("bf16", before), (base.info.precision, after)):
        print(f"  in {precision:4} {size / 1e6:10.1f} MB   {8 * size / parameters:5.2f} bits per parameter")
    return {"parameters": parameters, "bf16_bytes": before, "bytes": after, "load_seconds": seconds}


def show_ledger(s: DemoSettings, machine) -> dict:
    """From configs alone; with --adapter also how large its updates are beside the base's weights."""
    result = ledger.ledger(shapes.model_config(s.model)[0], s)
    ledger.show_ledger(result, s.model)
    result["others"] = ledger.show_other_models()
    if s.adapter:
        adapter = adapters.read_adapter(s.adapter)
        base = load_base(adapter.base_model, adapter.base.precision, machine, adapter.revision)
        result["trained"] = ledger.adapter_ledger(s.adapter, base.model)
        ledger.show_adapter_ledger(result["trained"])
    return result


def show_plan(s: DemoSettings, machine) -> dict:
    """From the config alone: no weights, no download for the presets."""
    config, where = shapes.model_config(s.model)
    print(f"  {s.model} ({where})")
    result = {"footprints": plan.footprints(config)}
    plan.show_footprints(s.model, result["footprints"])
    if s.model != COURSE_MODEL:
        result["course"] = plan.footprints(shapes.model_config(COURSE_MODEL)[0])
        print('  the model of many courses, quoted at 12.9, 3.6 and 2.2 GB, or at "1.6 GB, 8 times smaller":')
        plan.show_footprints(COURSE_MODEL, result["course"])
    result |= plan.make_plan(config, plan.training_job(s, machine), machine, s.gpus)
    plan.show_plan(result, config)
    return result


def save(s: DemoSettings, machine, results: dict) -> None:
    """Write each part with its settings; the parts of earlier runs stay until they are run again."""
    path = s.output_dir / "quantization.json"
    given = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(s).items()}
    about = {"settings": given, "environment": hardware.environment(machine)}
    parts = {part: {**about, "result": result} for part, result in results.items()}
    write_json(path, earlier_results(s.output_dir) | parts)
    pictures = ", ".join(sorted(p.name for p in path.parent.glob("*.png")))
    note(f"\nwritten    {path}" + (f"\npictures   {pictures}" if pictures else ""))
    note("next       python qlora_finetune.py")


if __name__ == "__main__":
    run(main, "choose a smaller --model, or fewer parts (--plan and --ledger need no weights)")
