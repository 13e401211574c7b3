"""Is the file that is deployed still the model that was trained? The same reviews through every rung, from NF4 + LoRA to Q4_0.

    python llama.cpp/parity.py                                # exports what is missing into gguf-out/, then measures all of it
    python llama.cpp/parity.py --gguf my-Q4_K_M.gguf           # only this file
    python llama.cpp/parity.py --gguf base.gguf+lora.gguf      # only this pair

GGUF files are asked over llama-server's HTTP interface, as a client would ask. Writes parity.json, parity.md and parity.png;
exits with 1 and the likely cause where a rung breaks its bound.
"""

from __future__ import annotations

import gc
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Sequence

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import export  # noqa: E402
from config import FREE_PROMPTS, FREE_TOKENS, LLAMA_CPP_TAG, ExportSettings, InferSettings, ParitySettings  # noqa: E402
from qlora.cli import UsageError, UserError, note, parse, require, run  # noqa: E402
from qlora.gguf_files import adapter_tokenizer, canonical  # noqa: E402

PROVED = HERE / "build" / "proved"
TOP = 1000  # likeliest next tokens asked of the server; the rest of the vocabulary counts as one


@dataclass
class Rung:
    name: str
    kind: str  # "merged" or "lora"
    type: str  # as llama-quantize names it
    files: list[Path]


def main(argv: Sequence[str] | None = None) -> None:
    from qlora.parity import bounds
    from qlora.runs import lock_folder

    settings = parse(ParitySettings, argv, __doc__)
    require(settings.eval_samples > 0, f"--eval-samples {settings.eval_samples}: at least 1 row is needed")
    require(not settings.output_dir.exists() or settings.output_dir.is_dir(), f"--output-dir {settings.output_dir}: is a file; name a folder")
    settings.types = tuple(map(canonical, settings.types))
    given_rungs = [given(spec) for spec in settings.gguf]
    adapter, exam = read(settings)
    lock_folder(settings.output_dir).release()  # what can't be written, or is being written, is told before the long part
    rungs = given_rungs or exported(settings, adapter)
    unusable = [inspect(rung, adapter) for rung in rungs]
    trained, merged = ask_trained(adapter, exam)
    results = [result(title(adapter), trained, trained, exam),
               result("merged 16 bit", merged, trained, exam, *bounds("merged", "bf16", False))]
    for rung, row in zip(rungs, unusable):
        results.append(row or measure(rung, adapter, trained, exam))
        save(settings, adapter, exam, results)
    hold_lora_to_q8(results)
    save(settings, adapter, exam, results)
    show(settings, results)


def read(settings: ParitySettings):
    """(the checked adapter, the exam of its held-out rows); all that can be refused without a model is refused here."""
    from qlora import prompts as p
    from qlora.adapters import read_adapter
    from qlora.data import load_rows, split
    from qlora.parity import Exam

    adapter, what = read_adapter(settings.adapter), f"--adapter {settings.adapter}"
    if adapter.prompt is None or adapter.prompt.objective != "sentiment":
        raise UsageError(f"{what}: parity is measured on labelled reviews; this adapter was not trained on labels by qlora_finetune.py")
    if not (export.BIN / "llama-server").exists() or not PROVED.is_file():
        raise UserError("llama.cpp is not built: run llama.cpp/build.sh first")
    tokenizer, prompt = adapter_tokenizer(adapter.folder), adapter.prompt
    if tokenizer.chat_template is None:
        raise UserError(f"{what}: its tokenizer has no chat template, so llama-server's chat can't ask it the same question")
    answer_ids = tuple(p.answer_ids(tokenizer, prompt, label)[0] for label in range(len(prompt.answers)))
    if len(answer_ids) != 2 or answer_ids[0] == answer_ids[1]:
        raise UsageError(f"{what}: parity is measured on two answers that differ in their first token, not on {', '.join(prompt.answers)}")
    name, held_out = adapter.dataset["name"], adapter.dataset["eval_samples"]
    found = load_rows(name)
    if found.kind != "labels" or found.answers != prompt.answers:
        raise UserError(f"{what}: {name} has changed since training: it has {', '.join(found.answers) or 'no labels'}, the adapter answers {', '.join(prompt.answers)}")
    if settings.eval_samples > held_out:
        note(f"note       {held_out} rows were held out in training; those are used")
    _, rows = split(found, 1, min(settings.eval_samples, held_out), adapter.dataset["seed"])
    note(f"data       {found.origin}: {len(rows)} held-out rows, {len(FREE_PROMPTS)} free prompts")
    free = [p.arranged(tokenizer, [{"role": "user", "content": text}]) for text in FREE_PROMPTS]
    messages = [p.arranged(tokenizer, p.fitted_messages(tokenizer, prompt, row.text)) for row in rows]
    return adapter, Exam(tokenizer, messages, free, [row.label for row in rows], prompt.answers, answer_ids, FREE_TOKENS, max(prompt.max_length, 128) + FREE_TOKENS)


def given(spec: str) -> Rung:
    files = [Path(spec)] if Path(spec).is_file() else [Path(name) for name in spec.split("+")]
    require(len(files) <= 2, f"--gguf {spec}: one file, or BASE.gguf+LORA.gguf")
    for file in files:
        require(file.is_file(), f"--gguf {file}: no such file")
    return Rung("+".join(f.stem for f in files), "lora" if len(files) == 2 else "merged", "", files)


def exported(settings: ParitySettings, adapter) -> list[Rung]:
    """The rungs of the ladder, from the files in --output-dir; what is not there (or of another adapter) is exported first."""
    have = lambda: export.recorded(settings.output_dir, adapter)  # noqa: E731
    make = lambda **what: export.make(ExportSettings(settings.adapter, output_dir=settings.output_dir, **what), replace_modelfile=False)  # noqa: E731
    few_bits = [t for t in settings.types if re.match("I?Q[1-4]", t)] if settings.imatrix else []
    for types, imatrix in ((settings.types, False), (few_bits, True)):
        there = {what["type"] for what in have().values() if what["kind"] == "merged" and what["imatrix"] == imatrix}
        missing = [t for t in types if t not in there]
        if missing:
            make(types=tuple(missing), imatrix=imatrix)
    unfit = export.unfit_for_lora_file(adapter)
    if unfit:
        note(f"note       no base + LoRA rung: {unfit}")
    elif not any(what["kind"] == "lora" for what in have().values()):
        make(lora=True)
    files, rungs = have(), []
    for imatrix, types in ((False, settings.types), (True, few_bits)):
        for kind in types:
            name = next(n for n, w in files.items() if w["kind"] == "merged" and w["type"] == kind and w["imatrix"] == imatrix)
            rungs.append(Rung(f"{kind} imatrix" if imatrix else kind, "merged", kind, [settings.output_dir / name]))
    if not unfit:
        rungs.append(Rung("base + LoRA", "lora", "", [settings.output_dir / next(n for n, w in files.items() if w["kind"] == part) for part in ("base", "lora")]))
    return rungs


def title(adapter) -> str:
    return f"{'NF4' if adapter.base.precision == 'nf4' else adapter.base.precision} + LoRA"


def ask_trained(adapter, exam):
    """(replies of the model as trained, replies of it merged to 16 bits)."""
    import qlora_inference
    from qlora.fast import speed_up_base
    from qlora.merging import merged_model
    from qlora.parity_reference import ask_transformers, at_other_strengths

    started = time.perf_counter()
    model, base, hardware = qlora_inference.load(InferSettings(adapter=(str(adapter.folder),)), [adapter])
    load_seconds = time.perf_counter() - started
    exam.tokenizer = base.tokenizer  # the one that qlora_inference.py prompts with
    trained = ask_transformers(model, exam, hardware, load_seconds, title(adapter))
    trained.scaled = at_other_strengths(model, adapter, trained, hardware)
    merged = merged_model("dequantized", adapter, base, hardware)
    speed_up_base(merged)
    replies = ask_transformers(merged, exam, hardware, None, "merged 16 bit")
    del model, base, merged  # the servers want the memory
    gc.collect()
    return trained, replies


# --- a GGUF file, through llama-server -----------------------------------------------------------------------------------


def inspect(rung: Rung, adapter) -> dict | None:
    """The row of a rung that can't be asked: a broken file is a broken rung, not the end of the ladder. None if its files are sound."""
    from qlora.gguf_files import check_pair, file_type, is_lora, read_gguf

    try:
        model, *lora = (read_gguf(file) for file in rung.files)
        if lora:
            check_pair(model, *lora, rung.files[1].name, adapter.folder / "adapter_model.safetensors")
            if export.known_files(rung.files[0].parent).get(rung.files[0].name, {}).get("kind") == "merged":
                raise UserError(f"{rung.files[0].name} holds its adapter already, which would be applied twice; give the base")
        elif is_lora(model):
            raise UserError(f"{rung.files[0].name} is a LoRA file; give it with its base: BASE.gguf+{rung.files[0].name}")
        if "tokenizer.ggml.tokens" not in model.fields:
            raise UserError(f"{rung.files[0].name} holds no tokenizer; it can't be asked anything")
        rung.type = rung.type or file_type(model)
    except UserError as error:
        return broken_row(rung, error)


def broken_row(rung: Rung, error: UserError) -> dict:
    note(f"{rung.name:14} broken: {error}")
    return {"name": rung.name, "kind": rung.kind, "files": [f.name for f in rung.files], "broken": [str(error)], "cause": None}


def measure(rung: Rung, adapter, trained, exam) -> dict:
    from qlora.gguf_files import read_gguf
    from qlora.parity import bounds

    try:
        model = read_gguf(rung.files[0])
        if len(model.fields["tokenizer.ggml.tokens"].data) > len(trained.next[0]):
            raise UserError(f"{rung.files[0].name} is another model: its vocabulary is larger than that of the model that was trained")
        size = sum(file.stat().st_size for file in rung.files)
        # Of a pair, the LoRA's bytes count and its weights do not: they replace nothing.
        facts = {"kind": rung.kind, "files": [f.name for f in rung.files], "bytes": size, "bits_per_weight": 8 * size / sum(int(t.n_elements) for t in model.tensors)}
        replies = ask_server(rung, exam)
        return result(rung.name, replies, trained, exam, *bounds(rung.kind, rung.type, trained_on(adapter, rung)), **facts)
    except UserError as error:
        return broken_row(rung, error)


def ask_server(rung: Rung, exam):
    import numpy as np

    from qlora.before_after import progress
    from qlora.llama_server import Server
    from qlora.parity import Replies

    with Server(export.BIN / "llama-server", rung.files[0], rung.files[1:], exam.context) as server:
        prompts, odds, nexts, timings = [], [], [], []
        with progress(len(exam.messages) + len(exam.free), rung.name) as step:
            for messages in exam.messages:
                prompts.append(server.prompt_ids(messages))
                reply = server.chat(messages, 1, TOP)
                if reply["prompt_tokens"] != len(prompts[-1]):
                    raise UserError(f"llama-server read {reply['prompt_tokens']} tokens of a prompt that it tokenizes to {len(prompts[-1])}")
                found = dict(zip(*reply["top"][0]))
                unseen = min(found.values())  # at most this likely
                no, yes = (found.get(token, unseen) for token in exam.answer_ids)
                odds.append(yes - no)
                nexts.append(reply["top"][0])
                timings.append(reply["timings"])
                step(1)
            free_next, free = [], []
            for messages in exam.free:
                prompts.append(server.prompt_ids(messages))
                free_next.append(server.chat(messages, 1, TOP)["top"][0])
                free.append(server.chat(messages, exam.free_tokens, to_the_end=True))
                step(1)
        read, written = (sum(t["prompt_n"] for t in timings), sum(r["timings"]["predicted_n"] - 1 for r in free))
        return Replies(prompts, np.array(odds), nexts, free_next, [r["text"] for r in free], server.load_seconds,
                       1000 * read / sum(t["prompt_ms"] for t in timings), 1000 * written / sum(r["timings"]["predicted_ms"] for r in free))


def trained_on(adapter, rung: Rung) -> bool:
    """Whether a pair's base holds the very weights that the adapter was trained on."""
    from qlora.fetch import sha256_of

    own_values = adapter.base.precision in ("bf16", "fp16", "fp32")
    return rung.kind == "lora" and own_values and adapter.base.revision == f"gguf-sha256:{sha256_of(rung.files[0])}"


# --- results -------------------------------------------------------------------------------------------------------------


def result(name: str, replies, trained, exam, least: float = 0.0, within: float | None = None, **facts) -> dict:
    from qlora.parity import cause, compare, verdict

    figures = compare(trained, replies, exam.truth, exam.answers)
    right = figures["accuracy"]["accuracy"]
    reference_right = sum((o > 0) == bool(t) for o, t in zip(trained.odds, exam.truth)) / len(exam.truth)
    broken = verdict(figures, reference_right, least, within)
    why = cause(trained, replies, exam.tokenizer.decode) if broken else None
    agrees = "reference" if replies is trained else f"agrees on {100 * figures['agreement']:.1f}%"
    note(f"{name:14} {agrees}, accuracy {100 * right:.1f}%, {figures['decode_tokens_per_second']:.1f} tokens/s"
         + (f"; broken: {'; '.join(broken)}: {why}" if broken else ""))
    return {"name": name, **facts, **figures, "bound": {"agreement": least, "accuracy_within": within}, "broken": broken, "cause": why}


def hold_lora_to_q8(results: list[dict]) -> None:
    """A pair that is exactly what was trained must be nearer to it than the best quantization of a merged file."""
    q8 = next((r for r in results if r["name"] == "Q8_0" and "kl" in r), None)
    for r in results:
        strict = r.get("kind") == "lora" and "kl" in r and r["bound"]["accuracy_within"] is not None
        if q8 and strict and r["kl"]["mean"] >= q8["kl"]["mean"]:
            r["broken"].append(f"mean KL {r['kl']['mean']:.2g} is not below Q8_0's {q8['kl']['mean']:.2g}")
            r["cause"] = r["cause"] or "the pair is not what was trained"


def save(settings: ParitySettings, adapter, exam, results: list[dict]) -> None:
    from qlora.hardware import detect, environment
    from qlora.runs import write_json

    settings.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(settings.output_dir / f"{stem(settings)}.json", {
        "environment": environment(detect(adapter.base.precision)), "llama_cpp": {"tag": LLAMA_CPP_TAG, "built": PROVED.read_text().splitlines()[1]}, "adapter": adapter.name,
        "base": {k: v for k, v in asdict(adapter.base).items() if k != "public_name"},  # a path of this machine, where the base is a file
        "rows": len(exam.truth), "free_prompts": len(exam.free), "free_tokens": exam.free_tokens, "top": TOP, "rungs": results,
    })


def stem(settings: ParitySettings) -> str:
    """Single files do not overwrite the ladder's record."""
    return "parity-given" if settings.gguf else "parity"


def show(settings: ParitySettings, results: list[dict]) -> None:
    """Table on stdout, files, and the one line that says what broke."""
    from qlora.parity_report import KEY, draw, markdown, table

    print(table(results))
    note("\n".join(KEY))
    if results[0]["accuracy"]["rows"] < 100:
        note("note       fewer than 100 rows: two rows more than the bound allows may differ; only gross faults show")
    name = stem(settings)
    (settings.output_dir / f"{name}.md").write_text(markdown(results))
    draw(settings.output_dir / f"{name}.png", results)
    note(f"written    {settings.output_dir}/: {name}.json, {name}.md, {name}.png")
    broken = [r for r in results if r["broken"]]
    if broken:
        raise UserError(f"{len(broken)} of {len(results)} rungs broken: " + " | ".join(f"{r['name']}: {r['cause'] or '; '.join(r['broken'])}" for r in broken))


if __name__ == "__main__":
    run(main)
