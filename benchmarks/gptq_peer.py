"""Our GPTQ and AWQ beside gptqmodel's, on the same rows: time, and perplexity of what each writes.

    python3 -m venv peer && peer/bin/pip install torch==2.13.0 transformers==5.23.0 setuptools wheel
    peer/bin/pip install --no-build-isolation gptqmodel==7.6.0 optimum==2.3.0
    python benchmarks/gptq_peer.py --python peer/bin/python        # an environment of its own: it pins others

Also: the peer's folders are read by this repository, and ours by plain transformers there. Writes
results/gptq_peer.json; what is in it is not measured again.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from config import BUNDLED
from qlora import calibrated
from qlora.cli import note, parse, run
from qlora.files import read_json, write_json
from qlora.hardware import detect, environment
from qlora.lab import compare
from qlora.loading import load_base
from qlora.sources import locate

RESULT = Path(__file__).with_name("results") / "gptq_peer.json"

QUANTIZE = """
import json, os, sys, time
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # else it refuses two cores
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD
source, out, method, group, ids = sys.argv[1:]
awq = method == "awq"
config = QuantizeConfig(bits=4, group_size=int(group), sym=False,
                        **({"quant_method": METHOD.AWQ, "format": FORMAT.GEMM} if awq else {}))
model = GPTQModel.load(source, config, device="cpu", dtype=torch.float16 if awq else torch.float32)
rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in json.load(open(ids))]
started = time.perf_counter()
model.quantize(rows, batch_size=8, **({"backend": BACKEND.AWQ_TORCH} if awq else {}))
print("SECONDS", time.perf_counter() - started)
model.save(out)
"""

READ = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder, ids, out = sys.argv[1:]
dtype = torch.float16 if "awq" in folder else torch.float32
model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
with torch.no_grad():
    logits = model(input_ids=torch.tensor(json.load(open(ids)))[:1, :64]).logits.float()
torch.save(logits, out)
"""


@dataclass
class Settings:
    # Python of an environment that has gptqmodel.
    python: Path = Path("peer/bin/python")
    # gptq, awq or both. gptqmodel's AWQ takes about a minute for each of 30 layers on two cores.
    methods: tuple[str, ...] = ("gptq",)
    # Reviews that are looked at.
    rows: int = 32
    # Tokens of each.
    length: int = 256
    # Inputs that share a scale.
    group_size: int = 64


def main() -> None:
    s = parse(Settings, None, __doc__)
    machine, source = detect("fp32"), locate(BUNDLED)[0]
    found = read_json(RESULT, "delete it") if RESULT.exists() else {"rows": []}
    found |= {"environment": environment(machine), "rows_seen": s.rows, "tokens_per_row": s.length}
    base = load_base(BUNDLED, "fp32", machine)
    held = compare.held_out(base.tokenizer, 64, seed=42)
    ids = calibrated.calibration_ids(base.tokenizer, s.rows, s.length, 64, seed=42)
    if not any(row["by"] == "16 bit" for row in found["rows"]):
        found["rows"].append({"by": "16 bit", "method": "", "perplexity": perplexity(base.model, held)})
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "ids.json"
        rows.write_text(json.dumps(ids.tolist()))
        for method in s.methods:
            for by, make in (("gptqmodel", theirs), ("here", ours)):
                if any((row["by"], row["method"]) == (by, method) for row in found["rows"]):
                    continue
                out = Path(scratch) / f"{by}-{method}"
                row = {
                    "by": by,
                    "method": method,
                    "group_size": s.group_size,
                    **make(s, method, source, ids, rows, out),
                }
                model = load_base(str(row.pop("folder")), method, machine).model
                row["perplexity"] = perplexity(model, held)
                found["rows"].append(row)
                write_json(RESULT, found)
                note(json.dumps(row))
    note(f"written {RESULT}")


def perplexity(model, held) -> float:
    return float(torch.tensor(compare.read(model, held.text, [])[1]).mean().exp())


def theirs(s: Settings, method: str, source: Path, ids, rows: Path, out: Path) -> dict:
    command = [s.python, "-c", QUANTIZE, source, out, method, s.group_size, rows]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds = float(done.stdout.split("SECONDS")[-1].split()[0])
    for path in source.glob("*token*"):
        (out / path.name).write_bytes(path.read_bytes())
    return {"seconds": seconds, "folder": out}


def ours(s: Settings, method: str, source: Path, ids, rows: Path, out: Path) -> dict:
    calibrated.MODELS_DIR = out
    out.mkdir()
    base = load_base(BUNDLED, "fp32", detect("fp32"))
    started = time.perf_counter()
    folder = calibrated.calibrated_folder(base, ids, method, s.group_size)
    seconds = time.perf_counter() - started
    # What plain transformers computes from our folder, by gptqmodel's kernels.
    logits = out / "logits.pt"
    command = [s.python, "-c", READ, folder, rows, logits]
    subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    with torch.no_grad():
        model = load_base(str(folder), method, detect("fp32")).model
        wanted = model(input_ids=ids[:1, :64]).logits
    apart = (torch.load(logits) - wanted).norm() / wanted.norm()
    return {"seconds": seconds, "folder": folder, "logits_apart_in_transformers": apart.item()}


if __name__ == "__main__":
    run(main)
