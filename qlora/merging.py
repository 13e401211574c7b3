"""Adapter + base -> one plain 16-bit model, without changing what was trained."""

from pathlib import Path

import bitsandbytes as bnb
import torch

from config import FEW_SHOT
from qlora.adapters import Adapter
from qlora.cli import UsageError, UserError, note
from qlora.files import free_bytes, seal, staged
from qlora.loading import Base, load_base
from qlora.logits import last_logits
from qlora.measures import relative_error
from qlora.prompts import render, sentiment_prompt
from qlora.weights import dequantized


def check_target(out: Path) -> None:
    """Raises UsageError if `out` exists and is not empty, or its parent can't be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--merge {out}: already there and not empty; choose a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--merge {out}: can't be written ({error.strerror})") from None


def merge_into(out: Path, which: str, adapter: Adapter, model, base: Base, compare: bool = True) -> None:
    """Write `adapter` merged into its base as a plain model folder; `which` is "dequantized" or "original".

    An adapter was trained against the 4-bit values. Merged into them (dequantized to 16 bits) it stays what
    it was; the original 16-bit weights are others than it was trained on. Both drifts are measured on the
    same prompts and printed; without `compare` only that of the model that is written.
    """
    wanted, free = 2.2e-9 * model.get_nb_trainable_parameters()[1], free_bytes(out) / 1e9
    if free < wanted:
        raise UserError(f"--merge {out}: needs {wanted:.1f} GB on the disk, {free:.1f} GB are free")
    prompts = probe_prompts(adapter, base)
    reference = logits_of(model, prompts, base)
    other = ["original" if which == "dequantized" else "dequantized"] if compare else []
    merged = None
    for kind in (*other, which):
        del merged  # one 16-bit model at a time
        merged = merged_model(kind, adapter, base)
        drift = relative_error(reference, logits_of(merged, prompts, base))
        chosen = "" if not compare else "; this one is written" if kind == which else "; not written"
        note(f"merge      into {kind} weights: logits {100 * drift:.2f}% off the trained model's{chosen}")
    with staged(out) as part:
        merged.save_pretrained(part)
        base.tokenizer.save_pretrained(part)
        seal(part)
    size = sum(p.stat().st_size for p in out.iterdir()) / 1e9
    note(f"weights    {str(merged.dtype).removeprefix('torch.')}, {size:.2f} GB")


def probe_prompts(adapter: Adapter, base: Base) -> list[list[int]]:
    texts = [text for text, _ in FEW_SHOT]
    if adapter.prompt and adapter.prompt.asks:
        return [sentiment_prompt(base.tokenizer, adapter.prompt, text) for text in texts]
    return [render(base.tokenizer, [{"role": "user", "content": text}], True) for text in texts]


def logits_of(model, prompts: list[list[int]], base: Base) -> torch.Tensor:
    """Logits after each prompt's last token (prompts, vocabulary), in fp32 on the CPU."""
    device, autocast = next(model.parameters()).device, base.hardware.autocast
    rows = (torch.tensor([ids], device=device) for ids in prompts)
    return torch.cat([last_logits(model, row, autocast).cpu() for row in rows])


def merged_model(which: str, adapter: Adapter, base: Base):
    """The base in 16 bits with the adapter's update added; each sum is made in fp32 and rounded once."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    name = "fp16" if base.info.dtype == "float16" else "bf16"
    plain = load_base(base.info.name, name, base.hardware, base.info.revision or None).model
    dtype = plain.dtype
    if which == "dequantized":
        copy_dequantized(base.model, plain)
    merged = PeftModel.from_pretrained(plain, adapter.folder)
    for layer in merged.modules():
        if isinstance(layer, LoraLayer):
            linear = layer.get_base_layer()
            linear.weight.data = linear.weight.data.float()
            layer.merge(safe_merge=True)  # refuses NaN
            linear.weight.data = linear.weight.data.to(dtype)
    return merged.unload().eval()


def copy_dequantized(quantized, plain) -> None:
    """Write the values that the quantized layers stand for into the plain model's layers of the same name.

    transformers' dequantize() would change the quantized model, which is still needed for comparing.
    """
    layers = dict(plain.named_modules())
    for name, module in quantized.named_modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            target = layers[name.removesuffix(".base_layer")]  # PEFT's name of a layer's frozen part
            target.weight.data = dequantized(module).to(target.weight.dtype).reshape(target.weight.shape)
