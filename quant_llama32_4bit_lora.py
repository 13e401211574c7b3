"""See what 4 bits do to a Llama, what LoRA adds, and what fits into memory, before training anything.

    python quant_llama32_4bit_lora.py                                    # every part, a few minutes
    python quant_llama32_4bit_lora.py --plan --model llama-3.1-8b        # one part; needs no weights
    python quant_llama32_4bit_lora.py --compare nf4 bf16 torchao-int8wo  # precisions side by side

Writes quantization.json and pictures into --output-dir (quant-out). Next: python qlora_finetune.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Sequence

from config import COMPARABLE, NAMED_ADAPTERS, DemoSettings
from qlora.cli import UserError, note, parse, require, run

PARTS = ("architecture", "untrained", "sampling", "datatypes", "ledger", "plan", "compare")  # in the order of the lesson
LONGEST = 1 << 20  # tokens that --plan takes
COURSE_MODEL = "llama-3.2-3b"  # its figures are quoted everywhere: 12.9, 3.6 and 2.2 GB, or "1.6 GB, 8 times smaller"
NEEDS_MODEL = ("architecture", "untrained", "sampling")  # the others load what they need themselves, or no weights at all


def read_settings(argv: Sequence[str] | None) -> DemoSettings:
    s = parse(DemoSettings, argv, __doc__)
    if s.target_modules in NAMED_ADAPTERS:
        modules, r = NAMED_ADAPTERS[s.target_modules]
        require(s.lora_r in (r, DemoSettings.lora_r), f"--target-modules {s.target_modules} means r {r}, --lora-r says {s.lora_r}: leave one out")
        s.target_modules, s.lora_r = modules, r
    require(s.lora_r > 0, f"--lora-r {s.lora_r}: the rank must be at least 1")
    require(s.lora_alpha is None or s.lora_alpha > 0, f"--lora-alpha {s.lora_alpha}: must be above 0")
    require(0 <= s.lora_dropout < 1, f"--lora-dropout {s.lora_dropout}: at least 0, below 1")
    require(s.batch_size > 0, f"--batch-size {s.batch_size}: at least 1")
    require(s.max_length >= 8, f"--max-length {s.max_length}: at least 8 tokens")
    require(s.eval_samples > 0, f"--eval-samples {s.eval_samples}: at least 1 row is needed to score")
    require(0 <= s.seed < 2**32, f"--seed {s.seed}: between 0 and 2**32 - 1")
    require(s.prompt.strip() != "", "--prompt: is empty")
    for name in s.compare or ():
        require(name in COMPARABLE, f"--compare {name}: no such precision; there are {', '.join(COMPARABLE)}")
    require(s.max_length <= LONGEST, f"--max-length {s.max_length}: at most {LONGEST:,} tokens")
    require(s.adapter is None or s.ledger or not any(getattr(s, part) not in (None, False) for part in PARTS), "--adapter is read by --ledger only")
    earlier_results(s)
    if s.adapter:
        from qlora.adapters import read_adapter

        if read_adapter(s.adapter).base is None:  # told now, not after the tables
            raise UserError(f"--adapter {s.adapter}: no qlora.json in it, so the base and the precision that it was trained on are unknown")
    return s


def earlier_results(settings: DemoSettings) -> dict:
    """Parts that earlier runs left in quantization.json; raises UsageError where this run could not write its own."""
    out = settings.output_dir
    above = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    require(above.is_dir(), f"--output-dir {out}: {above} is a file; name a folder")
    require(os.access(above, os.W_OK), f"--output-dir {out}: {above} is not writable")
    path = out / "quantization.json"
    try:
        earlier = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        earlier = None
    require(isinstance(earlier, dict), f"{path}: not written by this script; name another --output-dir")
    return earlier


def main(argv: Sequence[str] | None = None) -> None:
    settings = read_settings(argv)
    parts = [p for p in PARTS if getattr(settings, p) not in (None, False)] or list(PARTS)
    hardware = choose(settings)
    results = {}
    if set(parts) & set(NEEDS_MODEL):
        model, tokenizer, results["load"] = quantize(settings, hardware)
        results |= look_inside(parts, settings, model, tokenizer)
        del model  # what follows wants a clean state
    if "datatypes" in parts:
        results["datatypes"] = look_at_numbers(settings, hardware)
    results |= look_at_config(parts, settings, hardware)
    if "compare" in parts:
        results["compare"] = compare_precisions(settings, hardware)
    save(settings, hardware, results)
    note("\nnext       python qlora_finetune.py")


def choose(settings: DemoSettings):
    from qlora.hardware import detect, show
    from qlora.plan import default_model, training_job

    hardware = detect(settings.precision)
    show(hardware)
    why = "given"
    if settings.model == "auto":
        settings.model, why = default_model(hardware, training_job(settings, hardware))
    note(f"model      {settings.model} ({why})")
    return hardware


def title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}")


def quantize(settings: DemoSettings, hardware):
    """Load the weights as `--precision` and compare their bytes with what 16 bits would take."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from qlora.loading import DTYPES, fingerprint, locate, never_repack, readable, refuse_misread_rows, refuse_pickles
    from qlora.weights import held_bytes

    folder = locate(settings.model)[0]
    refuse_pickles(folder)
    fingerprint(folder)  # refuses a damaged config.json
    with readable(settings.model, folder), torch.device("meta"):  # shapes only: what 16 bits would take, without taking it
        full = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True), dtype=torch.bfloat16)
    before, parameters = full.get_memory_footprint(), full.num_parameters()

    # load_in_4bit=True alone would mean fp4, fp32 products and no double quantization.
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.precision if settings.precision in ("nf4", "fp4") else "nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=hardware.dtype,
    )
    config = {"nf4": four_bit, "fp4": four_bit, "int8": BitsAndBytesConfig(load_in_8bit=True)}.get(settings.precision)
    started = time.perf_counter()
    with readable(settings.model, folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES.get(settings.precision, hardware.dtype), quantization_config=config,
            device_map={"": hardware.device}, use_safetensors=True, local_files_only=True,
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    seconds = time.perf_counter() - started
    never_repack(model)
    refuse_misread_rows(settings.model, model)

    after = held_bytes(model.modules())  # get_memory_footprint() leaves out the block constants
    title(f"{settings.model} in {settings.precision}")
    print(f"{parameters:,} parameters")
    print(f"  in bf16   {before / 1e6:8.1f} MB   {8 * before / parameters:5.2f} bits per parameter")
    print(f"  in {settings.precision:5}  {after / 1e6:8.1f} MB   {8 * after / parameters:5.2f} bits per parameter   (loaded in {seconds:.1f} s)")
    result = {"parameters": parameters, "bf16_bytes": before, "bytes": after, "load_seconds": seconds}
    return model, tokenizer, result


def look_inside(parts: Sequence[str], settings: DemoSettings, model, tokenizer) -> dict:
    """The parts that need the loaded model."""
    s, results = settings, {}
    if "architecture" in parts:
        from qlora.outline import show_outline

        title("Architecture: what is quantized and what is not")
        results["architecture"] = show_outline(model)
    if "untrained" in parts:
        from qlora.untrained import show_untrained

        title("Untrained LoRA: A is random, B is zero")
        results["untrained"] = show_untrained(model, tokenizer, s.prompt, s.seed, s.lora_r, s.lora_alpha, s.target_modules, s.lora_variant)
    if "sampling" in parts:
        from qlora.sampling import draw_distribution, show_sampling

        title("Sampling: temperature, top-p, top-k")
        results["sampling"] = show_sampling(model, tokenizer, s.prompt, s.seed)
        draw_distribution(picture(s, "next_token.png"), results["sampling"])
    return results


def look_at_numbers(settings: DemoSettings, hardware) -> dict:
    """Data types on the 16-bit weights that quantization starts from, and on what flows between the layers."""
    from qlora.activations import show_activations
    from qlora.datatypes import show_datatypes, show_weight_errors
    from qlora.loading import load_base
    from qlora.pictures import draw_levels
    from qlora.weights import linear_layers

    base = load_base(settings.model, "fp32" if settings.precision == "fp32" else "bf16", hardware)
    name, layer = linear_layers(base.model)[0]
    title("Data types: what each stores and gives back")
    result = show_datatypes(layer.weight, name) | {"model": show_weight_errors(base.model), "activations": show_activations(base.model, base.tokenizer)}
    draw_levels(picture(settings, "levels.png"), layer.weight, name)
    return result


def look_at_config(parts: Sequence[str], settings: DemoSettings, hardware) -> dict:
    """The parts that need a config alone: no weights, no download for the presets."""
    from qlora import ledger, plan
    from qlora.memory import refuse_other_kinds

    if not {"ledger", "plan"} & set(parts):
        return {}
    s, results = settings, {}
    config, where = ledger.model_config(s.model)
    if "plan" in parts:
        refuse_other_kinds(config)
    if "ledger" in parts:
        frame = ledger.skeleton(config)
        title("LoRA ledger: what an adapter adds")
        results["ledger"] = ledger.ledger(frame, s.lora_r, s.lora_alpha, s.target_modules, s.lora_variant)
        ledger.show_ledger(results["ledger"], s.model)
        results["ledger"]["others"] = ledger.show_other_models()
        if s.adapter:
            results["ledger"]["trained"] = trained_updates(s, hardware)
    if "plan" in parts:
        title(f"Will it fit? {s.model} ({where})")
        results["plan"] = {"footprints": plan.footprints(config), **plan.make_plan(config, plan.training_job(s, hardware), hardware)}
        plan.show_footprints(s.model, results["plan"]["footprints"])
        if s.model != COURSE_MODEL:
            results["plan"]["course"] = plan.footprints(ledger.model_config(COURSE_MODEL)[0])
            print("  the model of many courses, quoted at 12.9, 3.6 and 2.2 GB, or at \"1.6 GB, 8 times smaller\":")
            plan.show_footprints(COURSE_MODEL, results["plan"]["course"])
        plan.show_plan(results["plan"], config)
    return results


def trained_updates(settings: DemoSettings, hardware) -> dict:
    from qlora.adapters import read_adapter
    from qlora.ledger import adapter_ledger, show_adapter_ledger
    from qlora.loading import load_base

    adapter = read_adapter(settings.adapter)
    base = load_base(adapter.base_model, adapter.base.precision, hardware, adapter.base.revision or None)
    result = adapter_ledger(settings.adapter, base.model)
    show_adapter_ledger(result)
    return result


def compare_precisions(settings: DemoSettings, hardware) -> dict:
    from qlora.compare import compare
    from qlora.compare_pictures import draw_errors, draw_sizes
    from qlora.precisions import default_precisions

    title("Precisions side by side")
    result = compare(settings.model, settings.compare or default_precisions(hardware), settings.eval_samples, settings.seed)
    draw_sizes(picture(settings, "precisions.png"), result["rows"])
    four_bit = next((p for p in ("nf4-dq", "nf4", "fp4", "torchao-int4wo") if p in result["errors"]), None)
    if four_bit:
        draw_errors(picture(settings, "errors.png"), result["errors"][four_bit], four_bit)
    return result


def picture(settings: DemoSettings, name: str) -> Path:
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    note(f"picture    {settings.output_dir / name}")
    return settings.output_dir / name


def save(settings: DemoSettings, hardware, results: dict) -> None:
    """Each part with its settings into quantization.json; parts of earlier runs stay until they are run again."""
    from qlora.hardware import environment
    from qlora.runs import write_json

    settings.output_dir.mkdir(parents=True, exist_ok=True)
    path = settings.output_dir / "quantization.json"
    given = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(settings).items()}
    write_json(path, earlier_results(settings) | {part: {"settings": given, "environment": environment(hardware), "result": result} for part, result in results.items()})
    note(f"\nwritten    {path}")


if __name__ == "__main__":
    run(main)
