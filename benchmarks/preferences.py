"""Does DPO learn which reply is wanted? Pairs made of IMDB reviews, scored by the training script itself.

    python benchmarks/preferences.py               # about half an hour on one slow core
    python benchmarks/preferences.py --tiny        # a rehearsal: 24 pairs; writes no result

As in the DPO paper's first experiment (arXiv 2305.18290, section 6) a review is to be finished, and a
positive end is preferred. A pair is made of three reviews. The prompt is 'Finish this review: "…"' with the
beginning of one, every other of them a negative one; the chosen reply is how a positive review ends, the
rejected one how a negative review ends, both the same number of words. So neither the topic nor the number of
words tells them apart. Each review is used once: held-out pairs share no text with training pairs. Writes
results/preferences.json: the report of qlora_finetune.py on these pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qlora.data import load_rows  # noqa: E402
from qlora.splitting import evenly  # noqa: E402

OUT = Path(__file__).parent / "results" / "preferences.json"
BEGINNING, ENDING = 24, 40  # words of a prompt's review and of a reply
TRAIN, HELD_OUT, TOKENS, RATE = 1000, 399, 160, 1e-4


def make_pairs(count: int) -> list[dict]:
    """[{prompt, chosen, rejected}], the prompts negative and positive in turn."""
    rows = [row for row in load_rows("imdb").rows if len(row.text.split()) >= BEGINNING + ENDING]
    by_label = [[row.text.split() for row in evenly(rows, 4 * count) if row.label == n] for n in (0, 1)]
    pairs = []
    for i in range(count):
        # Popped, so that no review is used again.
        beginning, worse, better = (by_label[label].pop() for label in (i % 2, 0, 1))
        prompt = f'Finish this review: "{" ".join(beginning[:BEGINNING])}"'
        replies = {"chosen": " ".join(better[-ENDING:]), "rejected": " ".join(worse[-ENDING:])}
        pairs.append({"prompt": prompt, **replies})
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="16 pairs to train, 8 held out; writes no result")
    parser.add_argument("--learning-rate", type=float, default=RATE)
    parser.add_argument("--keep", type=Path, help="folder for the run, which is deleted otherwise")
    flags = parser.parse_args()
    train, held_out = (16, 8) if flags.tiny else (TRAIN, HELD_OUT)
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder) / "pairs.jsonl", flags.keep or Path(folder) / "run"
        lines = [json.dumps(pair) + "\n" for pair in make_pairs(train + held_out)]
        file.write_text("".join(lines), encoding="utf-8")
        command = [sys.executable, str(ROOT / "qlora_finetune.py"), "--objective", "preference"]
        command += ["--dataset", str(file), "--samples", str(train), "--eval-samples", str(held_out)]
        command += ["--max-length", str(TOKENS), "--learning-rate", str(flags.learning_rate)]
        subprocess.run([*command, "--output-dir", str(run)], check=True, cwd=ROOT)
        report = json.loads((run / "report.json").read_text())
    example = json.loads(lines[0])
    kept = ("evaluation", "train", "data", "base", "memory", "seconds", "environment")
    record = {"words": {"prompt": BEGINNING, "reply": ENDING}, "example": example}
    settings = (
        "samples",
        "eval_samples",
        "max_length",
        "batch_size",
        "learning_rate",
        "beta",
        "lora_r",
        "lane",
    )
    record |= {"settings": {name: report["settings"][name] for name in settings}}
    record |= {name: report[name] for name in kept}
    record["data"]["origin"] = "pairs made of imdb by benchmarks/preferences.py"
    before, after = (report["evaluation"]["pairs"][when] for when in ("before", "after"))
    record["apart"] = after["low"] > before["high"]
    print(f"intervals apart: {record['apart']}")
    if not flags.tiny:
        OUT.write_text(json.dumps(record, indent=2) + "\n")
        print(f"written {OUT}")


if __name__ == "__main__":
    main()
