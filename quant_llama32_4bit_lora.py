"""Quantize a Llama to 4 bits, add an untrained LoRA adapter, and look at what each step did.

    python quant_llama32_4bit_lora.py
    python quant_llama32_4bit_lora.py --precision fp4 --target-modules attention --lora-r 32

No data, no training, nothing written. Next: python qlora_finetune.py
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Sequence

from config import DemoSettings
from qlora.cli import note, parse, require, run

TEMPERATURES = (0.0, 0.7, 1.5)


def read_settings(argv: Sequence[str] | None) -> DemoSettings:
    s = parse(DemoSettings, argv, __doc__)
    require(s.lora_r > 0, f"--lora-r {s.lora_r}: the rank must be at least 1")
    require(s.lora_alpha is None or s.lora_alpha > 0, f"--lora-alpha {s.lora_alpha}: must be above 0")
    require(0 <= s.lora_dropout < 1, f"--lora-dropout {s.lora_dropout}: at least 0, below 1")
    require(s.max_new_tokens > 0, f"--max-new-tokens {s.max_new_tokens}: at least 1")
    require(s.prompt.strip() != "", "--prompt: is empty")
    return s


def main(argv: Sequence[str] | None = None) -> None:
    settings = read_settings(argv)
    model, tokenizer, hardware = quantize(settings)
    model = add_untrained_lora(settings, model, tokenizer)
    sample(settings, model, tokenizer)
    note("\nnext       python qlora_finetune.py")


def quantize(settings: DemoSettings):
    """Load the weights as `--precision` and compare their bytes with what 16 bits would take."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig

    from qlora.hardware import detect
    from qlora.loading import DTYPES, default_model, locate, never_repack, refuse_pickles

    hardware = detect(settings.precision)
    name = settings.model if settings.model != "auto" else default_model(hardware)[0]
    note(f"device     {hardware.name}; {str(hardware.dtype).removeprefix('torch.')}: {hardware.why}")
    folder = locate(name)[0]
    refuse_pickles(folder)
    options = dict(device_map={"": hardware.device}, use_safetensors=True, local_files_only=True)

    with torch.device("meta"):  # shapes only: what 16 bits would take, without taking it
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
    dtype = DTYPES.get(settings.precision, hardware.dtype)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config, **options).eval()
    seconds = time.perf_counter() - started
    never_repack(model)
    model.generation_config = GenerationConfig()  # what a model ships (top-p, repetition penalty) would bend the temperatures

    after = model.get_memory_footprint()
    print(f"{name}: {parameters:,} parameters")
    print(f"  in bf16   {before / 1e6:8.1f} MB   {8 * before / parameters:5.2f} bits per parameter")
    print(f"  in {settings.precision:5}  {after / 1e6:8.1f} MB   {8 * after / parameters:5.2f} bits per parameter   (loaded in {seconds:.1f} s)")
    for (kind, stored), size in storage(model).most_common():
        print(f"    {size / 1e6:8.1f} MB   {kind} as {stored}")
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True), hardware


def storage(model) -> Counter:
    """Bytes per (module type, stored dtype); a 4-bit layer's block constants count as its own."""
    sizes: Counter = Counter()
    for module in model.modules():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            kind = type(module).__name__
            if kind == "Linear" and module is model.get_output_embeddings() and tensor is model.get_input_embeddings().weight:
                continue  # tied: the embedding's bytes again
            sizes[kind, str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return sizes


def add_untrained_lora(settings: DemoSettings, model, tokenizer):
    """Add LoRA, print what it added, and show that the output is still exactly the base's."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from qlora.lora import resolve_targets

    set_seed(settings.seed)
    ids = tokenizer(settings.prompt, return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():
        base_logits = model(input_ids=ids).logits
    config = LoraConfig(
        task_type="CAUSAL_LM", r=settings.lora_r, lora_alpha=settings.lora_alpha or 2 * settings.lora_r, lora_dropout=settings.lora_dropout,
        target_modules=resolve_targets(model, settings.target_modules),
        use_rslora=settings.lora_variant == "rslora", use_dora=settings.lora_variant == "dora",
    )
    model = get_peft_model(model, config).eval()
    trainable, total = model.get_nb_trainable_parameters()
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    print(f"LoRA r={config.r}, alpha={config.lora_alpha} on {', '.join(sorted(config.target_modules))}")
    print(f"  adds {trainable:,} parameters ({100 * trainable / total:.2f}% of all), {size / 1e6:.1f} MB in fp32")
    a, b = next((m.lora_A["default"].weight, m.lora_B["default"].weight) for m in model.modules() if hasattr(m, "lora_A"))
    print(f"  A {tuple(a.shape)} is random (std {a.std():.4f}), B {tuple(b.shape)} is zero (largest value {b.abs().max():.0f}), so BA = 0")
    with torch.inference_mode():
        lora_logits = model(input_ids=ids).logits
    same = "exactly the base's, bit for bit" if torch.equal(base_logits, lora_logits) else f"off by up to {(base_logits - lora_logits).abs().max():.3g}"
    print(f"  output with the untrained adapter: {same}")
    return model


def sample(settings: DemoSettings, model, tokenizer) -> None:
    """The same prompt at three temperatures, seeded."""
    import torch
    from transformers import GenerationConfig, set_seed

    inputs = tokenizer(settings.prompt, return_tensors="pt").to(model.device)
    print(f"prompt: {settings.prompt}")
    for temperature in TEMPERATURES:
        set_seed(settings.seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        config = GenerationConfig(max_new_tokens=settings.max_new_tokens, pad_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, **sampling)
        started = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(**inputs, generation_config=config)[0, inputs.input_ids.shape[1] :]
        rate = len(out) / (time.perf_counter() - started)
        kind = "greedy" if temperature == 0 else f"temperature {temperature}"
        print(f"  {kind} ({rate:.0f} tokens/s): {' '.join(tokenizer.decode(out, skip_special_tokens=True).split())}")


if __name__ == "__main__":
    run(main)
