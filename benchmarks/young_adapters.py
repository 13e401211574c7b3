"""What does it cost to add a young adapter's part to bf16 outputs, as PEFT does under autocast on a GPU?

    python benchmarks/young_adapters.py   # about an hour and a half on two slow cores

The bundled model, three seeds (LoRA's A and the order of rows), a short training on IMDB, five ways to
compute: `fp32` everything; `sum in fp32`: products and their outputs in bf16, LoRA's part and all else in
fp32; `sum in bf16`: the same, but the sum with LoRA's part is rounded to bf16; `residual in fp32`: what is
between the products is rounded, too, but not what layers add to; `bf16`: all of it, as on a GPU. Rounding is
simulated in fp32, so that it is as quick on any processor. A run that is in results/young_adapters.json
already is not repeated. Writes it and young_adapters.png.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import short_training
import torch

from config import TrainSettings
from qlora.cpu import lanes, products
from qlora.hardware import detect, environment
from qlora.pictures import COLOURS, new_axes, save
from qlora.weights import dequantized

RESULTS = Path(__file__).parent / "results"
OUT = RESULTS / "young_adapters.json"
SEEDS, ROWS, HELD_OUT, LENGTH, SHOWN = (1, 2, 3), 320, 300, 128, 40
WAYS = ("fp32", "sum in fp32", "sum in bf16", "residual in fp32", "bf16")
WRITTEN = {  # which arguments of an operator it writes, of those that are activations
    **{"rms_norm": (4, 5), "rms_backward": (5,), "gate_up": (1,), "gate_up_backward": (2,)},
    **{"rotate_in": (4, 5, 6), "rotate_back": (7,), "heads_to_flat": (2,), "softmax": (0,)},
}
# The residual stream: the sum that a norm reads, and its gradient.
STREAM = {"rms_norm": (4,), "rms_backward": (5,)}


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
        return (y if self.way == "sum in fp32" else rounded(y)), low

    def down(self, dy, x, low, pool, name):
        if self.way == "fp32":
            return super().down(dy, x, low, pool, name)
        dx, gradients = super().down(rounded(dy), x.bfloat16().float(), low, pool, name)
        return (None if dx is None else rounded(dx)), [rounded(g) for g in gradients]


class Rounding:
    """The kernels, with what they write rounded to bf16."""

    def __init__(self, kernels, stream: bool):
        self.kernels = kernels
        self.rounds = {
            name: [i for i in places if stream or i not in STREAM.get(name, ())]
            for name, places in WRITTEN.items()
        }

    def __getattr__(self, name):
        def run(*arguments):
            getattr(self.kernels, name)(*arguments)
            for i in self.rounds.get(name, ()):
                if arguments[i] is not None:
                    rounded(arguments[i])

        return run


def train(way: str, seed: int) -> dict:
    """Losses of each step and accuracy on held-out rows."""
    Group.way, lanes.Group = way, Group
    products.dequantized = lambda layer: dequantized(layer).bfloat16().float()  # the same values in each way

    def ready(model):
        decoder = model.get_base_model().cpu_decoder
        if way in ("residual in fp32", "bf16"):
            decoder.kernels = Rounding(decoder.kernels, way == "bf16")

    settings = TrainSettings(samples=ROWS, max_length=LENGTH, lane="fp32", seed=seed)
    row = {"way": way, "seed": seed} | short_training.train_and_score(settings, HELD_OUT, ready)
    print(json.dumps({k: v for k, v in row.items() if k != "losses"}), flush=True)
    return row


def draw(rows: list[dict]) -> None:
    """Mean loss of the first steps, by way."""
    figure, axes = new_axes(8, 5)
    for way, colour in zip(WAYS, COLOURS):
        runs = [row["losses"][:SHOWN] for row in rows if row["way"] == way]
        mean = [statistics.mean(step) for step in zip(*runs)]
        style = "--" if " in " in way else "-"  # lines lie on each other
        axes.plot(range(1, SHOWN + 1), mean, style, color=colour, label=way)
    axes.set(xlabel="step", ylabel=f"loss, mean of {len(SEEDS)} seeds", yscale="log")
    axes.set_title("The first steps of a young adapter")
    axes.legend()
    save(figure, RESULTS / "young_adapters.png")


def ways_of(rows: list[dict]) -> list[dict]:
    """Means over the seeds."""
    table = []
    for way in WAYS:
        runs = [row for row in rows if row["way"] == way]
        row = {"way": way, "seeds": len(runs)}
        row |= {f"loss_{step}": statistics.mean(r["losses"][step - 1] for r in runs) for step in range(1, 9)}
        row |= {key: statistics.mean(r[key] for r in runs) for key in ("last_quarter", "accuracy")}
        row |= {"lowest": min(r["accuracy"] for r in runs), "highest": max(r["accuracy"] for r in runs)}
        table.append(row | {"held_out_loss": statistics.mean(r["held_out_loss"] for r in runs)})
    return table


def main() -> None:
    rows = json.loads(OUT.read_text())["rows"] if OUT.exists() else []
    there = {(row["way"], row["seed"]) for row in rows}
    for seed in SEEDS:
        for way in WAYS:
            if (way, seed) not in there:
                rows.append(train(way, seed))
                record = {"training_rows": ROWS, "max_length": LENGTH, "held_out": HELD_OUT}
                record |= {"environment": environment(detect(lane="fp32")), "rows": rows}
                OUT.write_text(json.dumps(record, indent=2) + "\n")
    record = json.loads(OUT.read_text())
    OUT.write_text(json.dumps(record | {"ways": ways_of(rows)}, indent=2) + "\n")
    draw(rows)
    print(f"written {OUT}")


if __name__ == "__main__":
    main()
