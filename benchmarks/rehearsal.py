"""What can be rehearsed of the GPU road on a CPU, with the bundled model and real reviews.

    python benchmarks/rehearsal.py          # everything; about an hour on two cores
    python benchmarks/rehearsal.py --part several

fp16: a T4's arithmetic (fp16 under autocast, a real gradient scaler) beside bf16 at batch 1, 2 and 4: do the
guards judge rightly, is the accuracy after 200 rows the same? several: two processes over gloo beside one,
the same rows in each update: how far are the adapters apart, how fast is it? Writes results/rehearsal.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qlora  # noqa: F401, I001  (first: it sets what torch reads when it is imported)
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from config import BUNDLED, ROOT
from qlora import hardware
from qlora.training.trainer import QLoRATrainer

RESULT = Path(__file__).parent / "results" / "rehearsal.json"
ROWS = ("--samples", 200, "--eval-samples", 100, "--max-length", 80)


class FullSums(TorchDispatchMode):
    """16-bit matrix products with 16-bit inputs and results, summed in fp32 as a GPU's tensor cores do.

    It is also far faster than a CPU without 16-bit arithmetic, which is what most tests run on.
    """

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        dtype = args[-1].dtype if function in self.PRODUCTS else None
        if dtype not in (torch.float16, torch.bfloat16):
            return function(*args, **(kwargs or {}))
        return function(*(arg.float() for arg in args), **(kwargs or {})).to(dtype)


@contextlib.contextmanager
def playing(dtype: torch.dtype, scale: float = 65536.0):
    """This CPU computes as a card does in `dtype`: fp32 adapters, autocast, in fp16 a scaler from `scale`."""
    card = hardware.Hardware("cpu", "a CPU that plays a card", dtype, "as on a card", 15.0)
    mixed = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    begin = QLoRATrainer.__init__

    def with_autocast(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.accelerator.state._mixed_precision, self.accelerator.native_amp = mixed, True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", scale) if mixed == "fp16" else None

    with (
        patch.object(hardware, "_detect", lambda *args: card),
        patch.object(hardware.Hardware, "autocast", lambda self: torch.autocast("cpu", dtype=dtype)),
        patch.object(QLoRATrainer, "__init__", with_autocast),
        patch("qlora.fast.use_cpu", lambda *args: "a card's"),  # the CPU's decoder is not what a card takes
        FullSums(),
    ):
        yield


def fp16() -> list[dict]:
    """A row per dtype and batch; each run in its own process."""
    rows = []
    for batch_size in (1, 2, 4):
        for dtype in ("float16", "bfloat16"):
            with tempfile.TemporaryDirectory() as folder:
                call = [sys.executable, __file__, "--play", dtype, folder, str(batch_size)]
                done = subprocess.run(call, capture_output=True, text=True)
                path = Path(folder, "run", "report.json")
                if not path.exists():
                    row = {"error": done.stderr.strip().splitlines()[-1]}
                else:
                    report = json.loads(path.read_text())
                    keys = ("steps", "applied_updates", "loss_first", "loss_last", "seconds")
                    row = {key: report["train"][key] for key in keys}
                    row |= {"tuned": report["evaluation"]["tuned"], "guards": len(report["guards"])}
            rows.append({"dtype": dtype, "batch_size": batch_size, **row})
            print(rows[-1], flush=True)
    return rows


def play(dtype: str, folder: str, batch_size: str) -> None:
    import qlora_finetune

    out = ["--output-dir", str(Path(folder, "run")), "--model", BUNDLED, "--batch-size", batch_size]
    out += ["--precision", "fp32"]  # how it is held: a CPU's own kernel for nf4 takes hours in fp16
    with playing(getattr(torch, dtype)):
        qlora_finetune.main([*out, *map(str, ROWS)])


def several() -> dict:
    """One process with both cores, and two with one each: rows, tokens a second, the adapters' distance."""
    from safetensors.torch import load_file

    launchers = {
        1: ([sys.executable], {}),
        2: (
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"],
            {"OMP_NUM_THREADS": "1"},
        ),
    }
    result, adapters = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for count, (launch, env) in launchers.items():
            out = Path(folder, str(count))
            flags = ["--model", BUNDLED, "--batch-size", 4 // count, "--output-dir", out, *ROWS]
            flags += ["--max-steps", 20, "--precision", "fp32", "--eval-samples", 24]
            call = [*launch, "qlora_finetune.py", *map(str, flags)]
            subprocess.run(call, cwd=ROOT, env={**os.environ, **env}, check=True, stdout=subprocess.DEVNULL)
            report = json.loads((out / "report.json").read_text())
            result[f"{count} processes"] = {
                "tokens_per_second": report["train"]["tokens_per_second"],
                "loss_last": report["train"]["loss_last"],
                "tuned": report["evaluation"]["tuned"]["accuracy"],
            }
            adapters[count] = load_file(out / "adapter_model.safetensors")
    apart = {name: (adapters[1][name] - adapters[2][name]).abs().max().item() for name in adapters[1]}
    largest = max(tensor.abs().max().item() for name, tensor in adapters[1].items() if "lora_B" in name)
    return result | {"largest_difference": max(apart.values()), "largest_b": largest, "steps": 20}


PARTS = {"several": several, "fp16": fp16}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--part", choices=PARTS)
    flags.add_argument("--play", nargs=3, help=argparse.SUPPRESS)
    chosen = flags.parse_args()
    if chosen.play:
        play(*chosen.play)
        return
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in [chosen.part] if chosen.part else PARTS:
        kept[name] = PARTS[name]()
        kept["environment"] = hardware.environment(hardware.detect())
        RESULT.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"written {RESULT}")


if __name__ == "__main__":
    main()
