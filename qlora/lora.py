"""Which modules LoRA goes into, and what it adds."""

import textwrap
from collections import Counter

import torch
from peft import LoraConfig

from config import LORA_VARIANTS
from qlora.cli import UsageError, note, require
from qlora.weights import linear_layers, trainable_and_all

PREFIX = "base_model.model."  # what PEFT puts before a module's name


def linear_names(model) -> list[str]:
    """Last names of the model's linear layers but the head: ['down_proj', 'gate_proj', 'k_proj', …]"""
    return sorted({name.rsplit(".", 1)[-1] for name, _ in linear_layers(model)})


def resolve_targets(model, wanted: str) -> list[str]:
    """'all-linear', 'attention' or 'q_proj,v_proj' -> module names; a UsageError lists those there are."""
    there = linear_names(model)
    require(bool(there), "--target-modules: this model has no linear layers that LoRA could go into")
    if wanted == "all-linear":
        return there
    if wanted == "attention":
        names = sorted({name.rsplit(".", 1)[-1] for name, _ in linear_layers(model) if "attn" in name})
    else:
        names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in there]
    if unknown or not names:
        missing = ", ".join(unknown) or "such module"
        known = f"it has {', '.join(there)} (or: all-linear, attention)"
        raise UsageError(f"--target-modules {wanted}: the model has no {missing}; {known}")
    return names


def lora_config(model, settings, begins: bool = False) -> LoraConfig:
    """Of anything with lora_r, lora_alpha, lora_dropout, target_modules and lora_variant.

    How A and B begin is left out unless `begins`: a model without weights can't be decomposed.
    """
    options = dict(LORA_VARIANTS[settings.lora_variant].options)
    if not begins:
        options.pop("init_lora_weights", None)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_r,
        lora_dropout=settings.lora_dropout,
        target_modules=resolve_targets(model, settings.target_modules),
        **options,
    )


def refuse_broken_dora(model, lora_variant: str) -> None:
    """PEFT 0.21 reassigns int8 weights on a CPU for DoRA's norms, and bitsandbytes loses their scales."""
    int8_on_cpu = any(p.dtype == torch.int8 and p.device.type == "cpu" for p in model.parameters())
    if lora_variant == "dora" and int8_on_cpu:
        raise UsageError("--lora-variant dora does not work on int8 weights on a CPU: change --precision")


def show_trainable(model) -> None:
    """How much LoRA adds, by PEFT's own count (which knows what bitsandbytes packs), and where."""
    trainable, total = trainable_and_all(model)
    megabytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 1e6
    share = f"{100 * trainable / total:.2f}%"
    note(f"LoRA       {trainable:,} trainable of {total:,} parameters ({share}), {megabytes:.1f} MB in fp32")
    sizes: Counter = Counter()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            sizes[name.split(".lora_")[0].rsplit(".", 1)[-1]] += parameter.numel()
    shares = [f"{module}\xa0{100 * size / sizes.total():.1f}%" for module, size in sizes.most_common()]
    for line in textwrap.wrap(f"by module: {', '.join(shares)}", 98):
        note(f"           {line}".replace("\xa0", " "))
