"""Adapter + base -> one plain 16-bit model, without changing what was trained."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from config import FEW_SHOT
from qlora.adapters import Adapter
from qlora.cli import UsageError, UserError, note
from qlora.guards import last_logits
from qlora.hardware import Hardware
from qlora.loading import DTYPES, Base, load_base
from qlora.prompts import render, sentiment_prompt
from qlora.runs import set_usual_modes
from qlora.weights import dequantized


def claim_target(out: Path) -> None:
    """Raises UsageError if `out` is there and not empty, or its parent can't be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--merge {out}: already there and not empty; take a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--merge {out}: can't be written ({error.strerror})") from None


def merge_into(out: Path, which: str, adapter: Adapter, model, base: Base, hardware: Hardware, compare: bool = True) -> None:
    """Write `adapter` merged into its base as a plain model folder; `which` is "dequantized" or "original".

    An adapter was trained against the 4-bit values. Merged into them (dequantized to 16 bits) it stays what it
    was; merged into the original 16-bit weights it meets other weights than it was trained on. Both drifts are
    measured on the same prompts and printed; without `compare` only that of the one that is written.
    """
    parameters = model.get_nb_trainable_parameters()[1]
    free, wanted = shutil.disk_usage(out.parent).free, int(2.2 * parameters)
    if free < wanted:
        raise UserError(f"--merge {out}: needs {wanted / 1e9:.1f} GB on the disk, {free / 1e9:.1f} GB are free")
    prompts = probe_prompts(adapter, base)
    reference = logits_of(model, prompts, hardware)
    other = ["original" if which == "dequantized" else "dequantized"] if compare else []
    merged = None
    for kind in (*other, which):
        del merged  # one 16-bit model at a time
        merged = merged_model(kind, adapter, base, hardware)
        drift = (logits_of(merged, prompts, hardware) - reference).norm() / reference.norm()
        chosen = "" if not compare else "; this one is written" if kind == which else "; not written"
        note(f"merge      into the {kind} weights: logits differ by {100 * drift:.2f}% from base + adapter as trained{chosen}")
    staged = Path(tempfile.mkdtemp(dir=out.parent, prefix=".merge-"))
    try:
        merged.save_pretrained(staged)
        base.tokenizer.save_pretrained(staged)
        set_usual_modes(staged)
        if out.exists():
            out.rmdir()
        os.rename(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    size = sum(p.stat().st_size for p in out.iterdir()) / 1e9
    note(f"weights    {str(merged.dtype).removeprefix('torch.')}, {size:.2f} GB")


def probe_prompts(adapter: Adapter, base: Base) -> list[list[int]]:
    texts = [text for text, _ in FEW_SHOT]
    if adapter.prompt and adapter.prompt.objective == "sentiment":
        return [sentiment_prompt(base.tokenizer, adapter.prompt, text) for text in texts]
    return [render(base.tokenizer, [{"role": "user", "content": text}], True) for text in texts]


def logits_of(model, prompts: list[list[int]], hardware: Hardware) -> torch.Tensor:
    """Logits after each prompt's last token (prompts, vocabulary), in fp32 on the CPU."""
    device = next(model.parameters()).device
    return torch.cat([last_logits(model, torch.tensor([ids], device=device), hardware.autocast).cpu() for ids in prompts])


def merged_model(which: str, adapter: Adapter, base: Base, hardware: Hardware):
    """The base in 16 bits with the adapter's update added; each sum is made in fp32 and rounded once."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    sixteen = base.info.dtype if base.info.dtype in ("bfloat16", "float16") else "bfloat16"
    name = {"bfloat16": "bf16", "float16": "fp16"}[sixteen]
    plain = load_base(base.info.name, name, hardware, base.info.revision or None).model
    if which == "dequantized":
        copy_dequantized(base.model, plain)
    merged = PeftModel.from_pretrained(plain, adapter.folder)
    for layer in merged.modules():
        if isinstance(layer, LoraLayer):
            linear = layer.get_base_layer()
            linear.weight.data = linear.weight.data.float()
            layer.merge(safe_merge=True)  # refuses NaN
            linear.weight.data = linear.weight.data.to(DTYPES[name])
    return merged.unload().eval()


def copy_dequantized(quantized, plain) -> None:
    """Write the values that the quantized layers stand for into the plain model's layers of the same name."""
    import bitsandbytes as bnb

    layers = dict(plain.named_modules())
    for name, module in quantized.named_modules():
        # Inside PEFT a layer's frozen part is called base_layer.
        target = layers.get(name.removesuffix(".base_layer"))
        if not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            continue
        values = dequantized(module)
        target.weight.data = values.to(target.weight.dtype).reshape(target.weight.shape)
