"""Adapter + base -> one plain model, without changing what was trained."""

import math
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch

from config import FEW_SHOT, MERGE_KEEPS
from qlora.adapters import Adapter
from qlora.cards import PLAIN, plain_card
from qlora.cli import UsageError, UserError, note, require
from qlora.files import free_bytes, seal, staged, write_text
from qlora.loading import Base, load_base
from qlora.logits import last_logits
from qlora.measures import relative_error
from qlora.packed import METHODS as PACKED
from qlora.prompts import render, sentiment_messages, sentiment_prompt
from qlora.weights import dequantized, trainable_and_all


def check_target(out: Path, flag: str = "--merge") -> None:
    """Raises UsageError if `out` exists and is not empty, or its parent can't be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{flag} {out}: already there and not empty; choose a new folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{flag} {out}: can't be written ({error.strerror})") from None


def merge_into(
    out: Path, which: str, adapter: Adapter, model, base: Base, compare=True, dtype="auto", force=False
) -> None:
    """Write `adapter` merged into its base as a plain model folder; `which` is "dequantized" or "original".

    An adapter was trained against the 4-bit values. Merged into them (dequantized) it stays what it was; the
    original 16-bit weights are others than it was trained on. Both drifts are measured on the same prompts
    and printed; without `compare` only that of the model that is written. `dtype`: fp16, bf16, fp32, or auto
    (see merged_model). Raises UserError where less than MERGE_KEEPS of the update is left, unless `force`.
    """
    size = 4.4e-9 if dtype == "fp32" else 2.2e-9
    wanted, free = size * trainable_and_all(model)[1], free_bytes(out) / 1e9
    if free < wanted:
        raise UserError(f"--merge {out}: needs {wanted:.1f} GB on the disk, {free:.1f} GB are free")
    prompts = probe_prompts(adapter, base)
    reference = logits_of(model, prompts, base)
    if base.info.precision in PACKED:  # no original weights are at hand
        require(which == "dequantized", f"--merge-base original: {base.info.name} has no original weights")
        compare = False
    other = ["original" if which == "dequantized" else "dequantized"] if compare else []
    merged = None
    for kind in (*other, which):
        del merged  # one merged model at a time
        merged, kept = merged_model(kind, adapter, base, dtype)
        drift = relative_error(reference, logits_of(merged, prompts, base))
        chosen = "" if not compare else "; this one is written" if kind == which else "; not written"
        note(f"merge      into {kind} weights: logits {100 * drift:.2f}% off the trained model's{chosen}")
    note(f"           {kept.in_words()}")
    if adapter.qat:
        grid = f"through the grid of {adapter.qat}, which quantizing to {adapter.qat} applies"
        note(f"           trained {grid}: until then the logits are that far off")
    if kept.whole < MERGE_KEEPS and not force:
        raise UserError(f"--merge {out}: {kept.too_little()}")
    with staged(out) as part:
        merged.save_pretrained(part)
        base.tokenizer.save_pretrained(part)
        seal(part)
    size = sum(p.stat().st_size for p in out.iterdir()) / 1e9
    note(f"weights    {str(merged.dtype).removeprefix('torch.')}, {size:.2f} GB")


def write_card(out: Path, adapter: Adapter, base: Base) -> None:
    """README.md of a merged model, for the hub."""
    asks = adapter.prompt is not None and adapter.prompt.asks
    messages = sentiment_messages(adapter.prompt, "Your text.") if asks else []
    write_text(out / "README.md", plain_card(out.name, base.info.public_name, messages, **PLAIN))


@dataclass
class Kept:
    """What rounding to `dtype` leaves of an adapter's update."""

    dtype: str
    # Slope of what the update changes in the written weights on the update itself: 1 is all of it, 0 nothing.
    whole: float
    worst: float
    worst_matrix: str
    size: float  # of the update relative to the weights it is added to, all matrices together
    noise: float  # of rounding, relative to the update: it is there without an adapter as well

    def in_words(self) -> str:
        worst = f"{100 * self.worst:.2f}% of {self.worst_matrix}"
        left = f"{self.dtype}: {100 * self.whole:.2f}% of the update is left, at least {worst}"
        return f"{left}; rounding noise of {100 * self.noise:.2g}% of its size"

    def too_little(self) -> str:
        """What to do about a merge that loses the update."""
        size = f"it changes the weights by {100 * self.size:.2g}%, less than {self.dtype} can hold"
        finer = "choose --merge-dtype fp16 or fp32" if self.dtype == "bf16" else "choose --merge-dtype fp32"
        fix = "train longer" if self.dtype == "fp32" else finer
        lost = f"only {100 * self.whole:.1f}% of the adapter's update would be left"
        return f"{lost}: {size}; {fix}, keep the adapter apart (export.py --lora), or add --force"


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


def merged_model(which: str, adapter: Adapter, base: Base, dtype: str = "auto"):
    """(the base with the adapter's update added, how much of it is left).

    Each sum is made in fp32 of the very values that were trained on, and rounded once. `auto` is fp16: its
    steps are an eighth of bf16's, in which a small update is mostly lost. Where numbers do not fit into fp16,
    of weights or on their way through the model, it is bf16.
    """
    merged, kept = _merged_model(which, adapter, base, "fp16" if dtype == "auto" else dtype)
    if dtype == "auto" and not _finite(merged, base):
        note("           its numbers do not fit into fp16, so bf16")
        del merged
        return _merged_model(which, adapter, base, "bf16")
    return merged, kept


def _finite(merged, base: Base) -> bool:
    ids = render(base.tokenizer, [{"role": "user", "content": FEW_SHOT[0][0]}], True)
    weights = all(p.isfinite().all() for p in merged.parameters())
    return weights and bool(logits_of(merged, [ids], base).isfinite().all())


def _merged_model(which: str, adapter: Adapter, base: Base, dtype: str):
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    plain = load_base(base.info.name, dtype, base.hardware, base.info.revision or None).model
    held, trained_on = plain.dtype, {}
    if which == "dequantized":
        copy_dequantized(base.model, plain)
        trained_on = {name.removesuffix(".base_layer"): m for name, m in base.model.named_modules()}
    merged = PeftModel.from_pretrained(plain, adapter.folder)
    along = size = weights = rounding = 0.0
    worst = (1.0, "any matrix")
    for name, layer in merged.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            linear = layer.get_base_layer()
            source = trained_on[name] if trained_on else linear
            before = dequantized(source).float().reshape(linear.weight.shape).to(linear.weight.device)
            linear.weight.data = before.clone()
            layer.merge(safe_merge=True)  # refuses NaN
            update, written = linear.weight.data - before, linear.weight.data.to(held)
            left = written.float() - before.to(held).float()
            own, part = dot(update, update), dot(left, update)
            if own:
                worst = min(worst, (part / own, name.removeprefix("model.")))
            along, size, weights = along + part, size + own, weights + dot(before, before)
            rounding += dot(*2 * [written.float() - linear.weight.data])
            linear.weight.data = written
    if not size:  # an untrained adapter
        return merged.unload().eval(), Kept(dtype, 1.0, *worst, 0.0, 0.0)
    kept = Kept(dtype, along / size, *worst, math.sqrt(size / weights), math.sqrt(rounding / size))
    return merged.unload().eval(), kept


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.dot(a.double().flatten(), b.double().flatten()).item()


def copy_dequantized(quantized, plain) -> None:
    """Write the values that the quantized layers stand for into the plain model's layers of the same name.

    transformers' dequantize() would change the quantized model, which is still needed for comparing.
    """
    layers = dict(plain.named_modules())
    for name, module in quantized.named_modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            target = layers[name.removesuffix(".base_layer")]  # PEFT's name of a layer's frozen part
            target.weight.data = dequantized(module).to(target.weight.dtype).reshape(target.weight.shape)
