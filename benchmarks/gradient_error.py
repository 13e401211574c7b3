"""How far each lane's gradients and first losses are from fp32's, on the bundled model and real reviews.

    python benchmarks/gradient_error.py   # some minutes; longer where a lane is emulated

Every lane has the same frozen values (NF4's, rounded to bf16), the same adapter (B not zero) and the same
batches. `peft` is the sum as PEFT makes it under autocast: LoRA's part is rounded to bf16 and added to a bf16
output. Writes results/gradient_error_<kind of processor>.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qlora  # noqa: F401, I001  (first: it sets what torch reads when it is imported)
import torch
from peft import get_peft_model
from transformers import set_seed

from config import BUNDLED, MAX_GRAD_NORM, SENTIMENT_ANSWERS, TrainSettings
from processor import processor_kind
from qlora.batches import LengthBatches, collate, encode_rows
from qlora.cpu import kernels, lanes, products
from qlora.cpu.decoder import Decoder
from qlora.data import load_rows, split
from qlora.hardware import detect, environment
from qlora.loading import load_base
from qlora.logits import loss_at_labels
from qlora.lora import lora_config
from qlora.prompts import choose_format
from qlora.weights import dequantized

STEPS, RATE = 5, 1e-4
LENGTH = {True: 40, False: 256}  # of rows in fp16, by whether it is emulated


class Rounded(products.Group):
    """The bf16 lane with LoRA's part added to bf16 outputs, as PEFT does under autocast."""

    def up(self, x, pool, name, low_name):
        parts, self.parts = self.parts, []
        y, low = super().up(x, pool, name, low_name)
        self.parts = parts
        for columns, ranks, b, _ in parts:
            y[:, columns] = (y[:, columns].bfloat16() + low[:, ranks] @ b.t()).float()
        return y, low


def decoder(lm, lane: str) -> Decoder:
    """As attach() makes it, with frozen values rounded to bf16."""
    products.dequantized = lambda layer: dequantized(layer).bfloat16().float()
    if lane == "peft":
        lanes.Group = Rounded
    try:
        return Decoder(lm, {"peft": "bf16"}.get(lane, lane))
    finally:
        products.dequantized, lanes.Group = dequantized, products.Group


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_losses(model, batches) -> list[float]:
    """Of the first steps from B = 0, at a constant rate."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    start = {n: p.data.clone() for n, p in model.named_parameters() if p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0), []
    for batch in batches:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        losses.append(loss.item())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(start[name])
    return losses


def batches(tokenizer, length: int) -> list[dict]:
    prompt = choose_format("sentiment", "labels", SENTIMENT_ANSWERS, length)
    rows, _ = split(load_rows("imdb"), 400, 1, 42)
    made = encode_rows(tokenizer, prompt, rows, "training")
    order = list(LengthBatches([len(e["input_ids"]) for e in made], 4, 42))
    cut = [collate([made[i] for i in order[s : s + 4]], 0) for s in range(0, 4 * STEPS, 4)]
    return [{k: batch[k] for k in ("input_ids", "labels")} for batch in cut]


def main() -> None:
    hardware = detect(lane="fp32")
    base = load_base(BUNDLED, "nf4", hardware)
    set_seed(42)
    model = get_peft_model(base.model, lora_config(base.model, TrainSettings()))
    loss_at_labels(base.model)
    emulated = not kernels.processor_has("avx512_fp16")
    kernels.processor_has = lambda flag: True
    drawn = {n: torch.randn_like(p) * 0.02 for n, p in model.named_parameters() if "lora_B" in n}
    rows = []
    for lane in ("fp32", "bf16", "peft", "fp16"):
        length = LENGTH[emulated] if lane == "fp16" else 256
        given = batches(base.tokenizer, length)
        found = {}
        for each in ("fp32", lane):
            base.model.cpu_decoder = decoder(base.model, each)
            for name, parameter in model.named_parameters():
                if name in drawn:
                    parameter.data.copy_(drawn[name])
            losses = [] if lane == "fp16" and emulated else first_losses(model, given)
            for name, parameter in model.named_parameters():
                if name in drawn:
                    parameter.data.copy_(drawn[name])
            found[each] = gradients(model, given[0]), losses
        (exact, sure), (mine, losses) = found["fp32"], found[lane]
        apart = {n: (mine[n] - exact[n]).norm().item() for n in exact}
        total = sum(g.norm().item() ** 2 for g in exact.values()) ** 0.5
        row = {"lane": lane, "length": length, "emulated": lane == "fp16" and emulated}
        row |= {"whole": sum(a**2 for a in apart.values()) ** 0.5 / total}
        row |= {"worst_matrix": max(a / exact[n].norm().item() for n, a in apart.items())}
        row |= {"losses": losses, "losses_fp32": sure}
        row["losses_apart"] = max(abs(a - b) / b for a, b in zip(losses, sure)) if losses else None
        rows.append(row)
        print(json.dumps(row), flush=True)
    out = Path(__file__).parent / "results" / f"gradient_error_{processor_kind()}.json"
    out.write_text(json.dumps({"rows": rows, "environment": environment(hardware)}, indent=2) + "\n")
    print(f"written {out}")


if __name__ == "__main__":
    main()
