"""Does the parity ladder call a healthy file broken, or miss a fault, for weak and strong adapters?

    python benchmarks/verdicts.py                            # about half an hour; trains what is missing
    python benchmarks/verdicts.py --adapters a b --rows 64   # these instead of the five

Each adapter is merged and deployed as f16 and Q8_0, which must pass, and with each fault, which must be found
and called by its name. What is in results/verdicts.json already is not measured again. Needs the default run
in qlora-out/, and llama.cpp/build.sh.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "llama.cpp"))

import config  # noqa: F401  (first: it says in one line if packages are missing)
from base_forms import BaseForms
from gguf_export import convert, execute
from ladder import bound, result
from qlora.adapters import CONFIG, Adapter, load_trained, read_adapter
from qlora.cli import parse, run
from qlora.files import SEAL, scratch, write_json
from qlora.hardware import detect, environment
from qlora.measures import percent
from qlora.merging import merged_model
from qlora.tables import table
from reference import ask_trained, read_questions
from settings import BIN, ParitySettings
from variants import Variant, fault, measure

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "verdicts.json"
# From very weak to strong: training rows and tokens a row; the default run is the fifth.
TRAINED = ((16, 96), (64, 96), (256, 96), (500, 128))
STRENGTHS = {"half strength": 0.5, "doubled": 2.0}
# What the row of a faulty file must say: any of these.
NAMES = {
    "half strength": ("acts like 0.5 times",),
    "doubled": ("acts like 2 times",),
    "rsLoRA scaled by alpha/r": ("acts like 0.25 times",),  # of rank 16
    "not applied": ("not applied",),
    "Q4_0 quantized again": ("rounded to 4 bits before",),
    "another base": ("another base",),
    "another adapter": ("another adapter",),
    "doubled BOS": ("BOS is doubled",),
    "changed template": ("chat template",),
}


@dataclass
class Settings:
    # Adapter folders instead of the five.
    adapters: tuple[Path, ...] = ()
    # Held-out rows that each file is asked.
    rows: int = 64
    # Where adapters and files go.
    output_dir: Path = ROOT / "gguf-verdicts"


def trained_folders(s: Settings) -> list[Path]:
    """The five adapters; those that are missing are trained."""
    folders = []
    for rows, length in TRAINED:
        folder = s.output_dir / f"{rows}x{length}"
        flags = ["--samples", rows, "--max-length", length, "--eval-samples", s.rows, "--resume"]
        command = [sys.executable, ROOT / "qlora_finetune.py", *flags, "--output-dir", folder]
        subprocess.run(list(map(str, command)), check=True)  # does nothing if it is complete
        folders.append(folder)
    return [*folders, ROOT / "qlora-out"]


class Planter:
    """Makes the files of one adapter in `aside`: healthy ones, and one for each fault."""

    def __init__(self, adapter: Adapter, other: Adapter, aside: Path):
        self.adapter, self.other, self.aside = adapter, other, aside
        self.base = load_trained(adapter)[1]

    def merge(self, name: str, adapter: Adapter, kind: str = "dequantized") -> Path:
        merged, _ = merged_model(kind, adapter, self.base)
        folder, file = self.aside / "merged", self.aside / f"{name}-f16.gguf"
        merged.save_pretrained(folder)
        self.base.tokenizer.save_pretrained(folder)
        convert(folder, file)
        shutil.rmtree(folder)
        return file

    def scaled(self, strength: float) -> Adapter:
        folder = self.aside / f"scaled-{strength:g}"
        shutil.copytree(self.adapter.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*", SEAL))
        options = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(options | {"lora_alpha": options["lora_alpha"] * strength}))
        return replace(self.adapter, folder=folder)

    def quantized(self, f16: Path, kind: str = "Q8_0") -> Path:
        file = f16.with_name(f16.name.replace(".gguf", f"-{kind}.gguf"))
        execute(BIN / "llama-quantize", "--allow-requantize", f16, file, kind)
        return file

    def with_template(self, f16: Path, name: str, change) -> Path:
        file, template = self.aside / f"{name}.gguf", change(self.base.tokenizer.chat_template)
        new = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--chat-template", template, f16, file]
        execute(*new)
        return file

    def file(self, what: str) -> Path:
        good = self.aside / "good-f16.gguf"
        if not good.exists():
            self.merge("good", self.adapter)
        match what:
            case "f16":
                return good
            case "Q8_0":
                return self.quantized(good)
            case "doubled BOS":
                return self.with_template(good, "bos", lambda text: "{{ bos_token }}" + text)
            case "changed template":
                start = "<|im_start|>"
                return self.with_template(good, "other", lambda text: text.replace(start, "<|start|>"))
            case "Q4_0 quantized again":
                return self.quantized(self.quantized(good, "Q4_0"))
            case "another base":
                return self.quantized(self.merge("original", self.adapter, "original"))
            case "another adapter":
                return self.quantized(self.merge("other", self.other))
            case "not applied":
                return self.quantized(self.merge("zero", self.scaled(0)))
            case "rsLoRA scaled by alpha/r":
                return self.quantized(self.merge("quarter", self.scaled(self.adapter.config["r"] ** -0.5)))
        return self.quantized(self.merge("scaled", self.scaled(STRENGTHS[what])))


def judge(s: Settings, adapter: Adapter, other: Adapter, known: list[dict]):
    """Yields the verdict on each file that is not known yet."""
    missing = [what for what in ("f16", "Q8_0", *NAMES) if what not in {v["file"] for v in known}]
    if not missing:
        return
    _, questions = read_questions(ParitySettings(adapter.folder, eval_samples=s.rows))
    questions = replace(questions, free=questions.free[:1], free_tokens=2)  # not what is judged here
    with scratch(s.output_dir) as aside:
        trained, merged, _ = ask_trained(adapter, questions, "trained", aside)
        row = result("merged", merged, trained, questions, bound("transformers", "f16", False))
        trained.merge_drift = row["log_odds_shift"]["rms"]
        if not known:
            yield verdict("merged 16 bit", row)
        forms, planter = BaseForms(adapter, questions, aside), Planter(adapter, other, aside)
        for what in missing:
            file = planter.file(what)
            variant = Variant(what, "", [file])
            row = fault(variant, adapter) or measure(variant, adapter, trained, questions, forms)
            if file.name != "good-f16.gguf":
                file.unlink()
            yield verdict(what, row)


def verdict(what: str, row: dict) -> dict:
    said = "; ".join([*row["broken"], str(row["cause"])])
    facts = {key: row.get(key) for key in ("agreement", "sure", "survival", "rounding", "log_odds_shift")}
    expected = NAMES.get(what, ())
    right = any(name in said for name in expected) if expected else not row["broken"]
    return {
        "file": what,
        "broken": row["broken"],
        "cause": row["cause"],
        "expected": expected,
        "right": right,
    } | {
        **facts,
        "kl": row.get("kl"),
    }


def main(argv=None) -> None:
    s = parse(Settings, argv, __doc__)
    record = json.loads(OUT.read_text()) if OUT.exists() else {"adapters": []}
    folders = list(s.adapters) or trained_folders(s)
    for i, folder in enumerate(folders):
        adapter, other = read_adapter(folder), read_adapter(folders[i - 1])
        known = [a for a in record["adapters"] if (a["name"], a["rows"]) == (adapter.name, s.rows)]
        entry = known[0] if known else {"name": adapter.name, "rows": s.rows, "verdicts": []}
        if not known:
            record["adapters"].append(entry)
        for found in judge(s, adapter, other, entry["verdicts"]):
            entry["verdicts"].append(found)
            record["summary"] = [summary(each) for each in record["adapters"]]
            write_json(OUT, record | {"environment": environment(detect())})
    show(record["adapters"])


def summary(adapter: dict) -> dict:
    """What the docs' table shows: how strong an adapter is, and how many verdicts were right."""
    healthy = [v for v in adapter["verdicts"] if not v["expected"]]
    faulty = [v for v in adapter["verdicts"] if v["expected"]]
    row = {"name": adapter["name"], "rows": adapter["rows"]}
    for kind, verdicts in (("healthy", healthy), ("faulty", faulty)):
        row[kind] = f"{sum(v['right'] for v in verdicts)} of {len(verdicts)}"
    q8 = next((v for v in healthy if v["file"] == "Q8_0" and v["rounding"]), None)
    return row | ({key: q8["rounding"][key] for key in ("effect", "noise")} if q8 else {})


def show(adapters: list[dict]) -> None:
    heads = ["file", *(a["name"] for a in adapters)]
    files = ["merged 16 bit", "f16", "Q8_0", *NAMES]
    cells = {(a["name"], v["file"]): cell(v) for a in adapters for v in a["verdicts"]}
    print(table(heads, [[f, *(cells.get((a["name"], f), "") for a in adapters)] for f in files], indent=0))
    wrong = [f"{a['name']} {v['file']}" for a in adapters for v in a["verdicts"] if not v["right"]]
    print(f"wrong: {', '.join(wrong) or 'none'}")


def cell(v: dict) -> str:
    left = f", {percent(v['survival']['share'])} left" if v["survival"] else ""
    said = "passes" if not v["broken"] else "named" if v["right"] else "broken"
    return f"{said}{left}" + ("" if v["right"] else " WRONG")


if __name__ == "__main__":
    run(main)
