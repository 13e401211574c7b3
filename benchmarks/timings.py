"""What the small things cost: --help, the memory plan, the whole lab, disk space.

    python benchmarks/timings.py             # about three minutes on two cores; writes results/timings.json
    python benchmarks/timings.py help disk   # only these parts; the others keep what they have

Seconds are those of one run; peak is the largest resident set of the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LAB = "quant_llama32_4bit_lora.py"
SCRIPTS = (LAB, "qlora_finetune.py", "qlora_inference.py")
CARD = "A100 40"  # a card of the lab's table that every preset fits


def timed(*command: str) -> tuple[dict, str]:
    """({seconds, peak_bytes}, what it wrote to stdout and stderr) of a command that has to succeed."""
    with tempfile.TemporaryFile("w+") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, process.returncode, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{text[-2000:]}")
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024}, text


def help() -> dict:
    return {script: timed(sys.executable, script, "--help")[0]["seconds"] for script in SCRIPTS}


def plan() -> dict:
    """Cost of planning an 8B model, and the peaks predicted for the models that a GPU trains by default."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ("--plan", "--output-dir", folder, "--model")
        result, _ = timed(sys.executable, LAB, *flags, "llama-3.1-8b")
        for model in ("llama-3.2-1b", "llama-3.2-3b"):
            timed(sys.executable, LAB, *flags, model)
            cards = json.loads((Path(folder) / "quantization.json").read_text())["plan"]["result"]["cards"]
            result[model] = next(card["peak"] for card in cards if card["card"] == CARD)
    return result


def lab() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return timed(sys.executable, LAB, "--output-dir", folder)[0]


def disk() -> dict:
    sizes = {
        name: [f.stat().st_blocks * 512 for f in (ROOT / name).rglob("*")] for name in (".venv", "models")
    }
    return {name: sum(blocks) for name, blocks in sizes.items()}


def main() -> None:
    parts = {part.__name__: part for part in (help, plan, lab, disk)}
    if unknown := set(sys.argv[1:]) - set(parts):
        sys.exit(f"error: no part {', '.join(unknown)}; there are {', '.join(parts)}")
    file = RESULTS / "timings.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for name in sys.argv[1:] or parts:
        results[name] = parts[name]()
        print(name, results[name], flush=True)
        file.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written {file}")


if __name__ == "__main__":
    main()
