"""Which modules LoRA goes into, and what it adds."""

from __future__ import annotations

import torch

from qlora.cli import UsageError, note


def linear_names(model) -> list[str]:
    """Last names of the model's linear layers but the head: ['down_proj', 'gate_proj', 'k_proj', …]"""
    head = model.get_output_embeddings()
    return sorted({name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head})


def resolve_targets(model, wanted: str) -> list[str]:
    """'all-linear', 'attention' or 'q_proj,v_proj' -> names of modules; raises UsageError listing those there are."""
    there = linear_names(model)
    if not there:
        raise UsageError("--target-modules: this model has no linear layers that LoRA could go into")
    if wanted == "all-linear":
        return there
    if wanted == "attention":
        inside = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "attn" in n}
        if not inside & set(there):
            raise UsageError(f"--target-modules attention: no linear layer is named so; the model has {', '.join(there)} (or: all-linear)")
        return sorted(inside & set(there))
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if name not in there]
    if unknown or not names:
        raise UsageError(f"--target-modules {wanted}: the model has no {', '.join(unknown) or 'such module'}; it has {', '.join(there)} (or: all-linear, attention)")
    return names


def refuse_broken_dora(model, lora_variant: str) -> None:
    """For DoRA's norms PEFT 0.21 assigns int8 weights anew on a CPU, and bitsandbytes then overwrites its scales with None."""
    if lora_variant == "dora" and any(p.dtype == torch.int8 and p.device.type == "cpu" for p in model.parameters()):
        raise UsageError("--lora-variant dora does not work on int8 weights on a CPU (PEFT loses their scales); use another --precision")


def show_trainable(model) -> None:
    """One line: how much LoRA adds, by PEFT's own count (it knows that 4-bit weights are packed two to a byte)."""
    trainable, total = model.get_nb_trainable_parameters()
    megabytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / 1e6
    note(f"LoRA       {trainable:,} trainable of {total:,} parameters ({100 * trainable / total:.2f}%), {megabytes:.1f} MB in fp32")
