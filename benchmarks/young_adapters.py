"""What does it cost to add a young adapter's part to bf16 outputs, as PEFT does under autocast on a GPU?

    python benchmarks/young_adapters.py   # about an hour and a half on two slow cores

The bundled model, three seeds (LoRA's A and the order of rows), a short training on IMDB, three ways to
compute: `fp32` everything; `sum in fp32`: products and their outputs in bf16, LoRA's part and the residual
stream in fp32; `bf16`: outputs, LoRA's part, their sum and the residual stream rounded to bf16, as on a GPU.
Rounding is simulated in fp32, so that it is as quick on any processor. Writes results/young_adapters.json and
young_adapters.png.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qlora  # noqa: F401, I001  (first: it sets what torch reads when it is imported)
import torch
from peft import get_peft_model
from transformers import get_linear_schedule_with_warmup, set_seed

from config import BUNDLED, MAX_GRAD_NORM, PAD_MULTIPLE, SENTIMENT_ANSWERS, TrainSettings
from qlora.batches import LengthBatches, collate, encode_rows
from qlora.cpu import lanes, products
from qlora.data import load_rows, split
from qlora.evaluation import accuracy_report, score_labels
from qlora.fast import make_fast
from qlora.hardware import detect, environment
from qlora.loading import load_base
from qlora.lora import lora_config
from qlora.pictures import COLOURS, new_axes, save
from qlora.prompts import answer_ids, choose_format, sentiment_prompt
from qlora.weights import dequantized

RESULTS = Path(__file__).parent / "results"
SEEDS, ROWS, HELD_OUT, LENGTH = (1, 2, 3), 512, 400, 128
WAYS = ("fp32", "sum in fp32", "bf16")
WRITTEN = {  # which arguments of an operator it writes, of those that are activations
    **{"rms_norm": (4, 5), "rms_backward": (5,), "gate_up": (1,), "gate_up_backward": (2,)},
    **{"rotate_in": (4, 5, 6), "rotate_back": (7,), "heads_to_flat": (2,), "softmax": (0,)},
}


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.copy_(tensor.bfloat16())


class Group(products.Group):
    """Products in fp32 of numbers in bf16, their outputs rounded; `way` says how LoRA's part is added."""

    way = "fp32"

    def up(self, x, pool, name, low_name):
        if self.way == "fp32":
            return super().up(x, pool, name, low_name)
        parts, self.parts = self.parts, []
        y, low = super().up(x.bfloat16().float(), pool, name, low_name)
        self.parts = parts
        rounded(y), rounded(low)
        for columns, ranks, b, _ in parts:
            part = rounded(low[:, ranks] @ b.bfloat16().float().t())
            y[:, columns] += part
        return (rounded(y) if self.way == "bf16" else y), low

    def down(self, dy, x, low, pool, name):
        if self.way == "fp32":
            return super().down(dy, x, low, pool, name)
        dx, gradients = super().down(rounded(dy), x.bfloat16().float(), low, pool, name)
        return (None if dx is None else rounded(dx)), [rounded(g) for g in gradients]


class Rounding:
    """The kernels, with what they write rounded to bf16."""

    def __init__(self, kernels):
        self.kernels = kernels

    def __getattr__(self, name):
        def run(*arguments):
            getattr(self.kernels, name)(*arguments)
            for i in WRITTEN.get(name, ()):
                if arguments[i] is not None:
                    rounded(arguments[i])

        return run


def train(way: str, seed: int) -> dict:
    """Losses of each step and accuracy on held-out rows."""
    base = load_base(BUNDLED, "nf4", detect(lane="fp32"))
    prompt = choose_format("sentiment", "labels", SENTIMENT_ANSWERS, LENGTH)
    rows, held_out = split(load_rows("imdb"), ROWS, HELD_OUT, 42)
    examples = encode_rows(base.tokenizer, prompt, rows, "training")
    set_seed(seed)
    model = get_peft_model(base.model, lora_config(base.model, TrainSettings()))
    Group.way, lanes.Group = way, Group
    products.dequantized = lambda layer: dequantized(layer).bfloat16().float()  # the same values in each way
    make_fast(model, "fp32")
    if way == "bf16":
        base.model.cpu_decoder.kernels = Rounding(base.model.cpu_decoder.kernels)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TrainSettings.learning_rate, weight_decay=0.0)
    order = list(LengthBatches([len(e["input_ids"]) for e in examples], 4, seed))
    steps = len(order) // 4
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    losses, started = [], time.perf_counter()
    model.train()
    for step in range(steps):
        given = collate([examples[i] for i in order[4 * step : 4 * step + 4]], 0, PAD_MULTIPLE)
        given.pop("real_tokens")
        loss = model(**given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    prompts = [sentiment_prompt(base.tokenizer, prompt, row.text) for row in held_out]
    answers = [answer_ids(base.tokenizer, prompt, label) for label in (0, 1)]
    said = score_labels(model, prompts, answers, base.hardware.autocast).argmax(1).tolist()
    report = accuracy_report(said, [row.label for row in held_out], prompt.answers)
    row = {"way": way, "seed": seed, "losses": losses, "last_quarter": statistics.mean(losses[-steps // 4 :])}
    row |= {"accuracy": report["accuracy"], "seconds": time.perf_counter() - started}
    print(json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True)
    return row


def draw(rows: list[dict]) -> None:
    """Mean loss of the first steps, by way."""
    figure, axes = new_axes(8, 5)
    for way, colour in zip(WAYS, COLOURS):
        runs = [row["losses"][:40] for row in rows if row["way"] == way]
        axes.plot(range(1, 41), [statistics.mean(step) for step in zip(*runs)], color=colour, label=way)
    axes.set(xlabel="step", ylabel=f"loss, mean of {len(SEEDS)} seeds", yscale="log")
    axes.set_title("The first steps of a young adapter")
    axes.legend()
    save(figure, RESULTS / "young_adapters.png")


def main() -> None:
    rows = [train(way, seed) for seed in SEEDS for way in WAYS]
    record = {"rows": rows, "training_rows": ROWS, "max_length": LENGTH, "held_out": HELD_OUT}
    out = RESULTS / "young_adapters.json"
    out.write_text(json.dumps(record | {"environment": environment(detect())}, indent=2) + "\n")
    draw(rows)
    print(f"written {out}")


if __name__ == "__main__":
    main()
