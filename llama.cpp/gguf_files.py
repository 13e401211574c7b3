"""GGUF files: type, size, whether one is complete and fits; and export.json, which says what each one is."""

import json
import struct
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGUFReader, LlamaFileType, dequantize
from safetensors import safe_open

from ollama import adds_bos
from qlora.adapters import CONFIG, WEIGHTS, Adapter
from qlora.cli import UsageError, UserError
from qlora.files import publish, sha256_of, write_json
from qlora.loading import load_tokenizer
from qlora.measures import most_values_in_32

RECORD = "export.json"
MODELFILES = ("Modelfile", "Modelfile-lora")
# {7: "Q8_0", …}: the number that a file holds -> the name that llama-quantize takes
TYPES = {t.value: t.name.split("_", 1)[1] for t in LlamaFileType if t.name != "GUESSED"}


def canonical(kind: str) -> str:
    """'q8_0' -> 'Q8_0', 'F16' -> 'f16'; raises UsageError for what llama-quantize does not know."""
    if kind.upper() not in TYPES.values():
        raise UsageError(
            f"--types {kind}: not a type of llama-quantize, like f16, Q8_0, Q6_K, Q4_K_M or Q4_0"
        )
    return kind.lower() if kind.upper() in ("F16", "BF16", "F32") else kind.upper()


def under_five_bits(kind: str) -> bool:
    """Whether blocks of this family take under five bits a weight: 'Q4_K_M', 'TQ1_0', 'MXFP4_MOE' -> True"""
    family = [sizes for t, sizes in GGML_QUANT_SIZES.items() if t.name.split("_")[0] == kind.split("_")[0]]
    return any(8 * size / weights < 5 for weights, size in family)


def file_type(reader: GGUFReader) -> str:
    """'Q8_0' for MOSTLY_Q8_0; 'unknown' if the file does not say."""
    field = reader.fields.get("general.file_type")
    return canonical(TYPES[field.contents()]) if field and field.contents() in TYPES else "unknown"


def size_of(model: GGUFReader, *files: Path) -> tuple[int, float]:
    """(bytes of all files, their bits per weight of the model: a LoRA file's weights replace none)."""
    size = sum(file.stat().st_size for file in files)
    return size, 8 * size / sum(int(t.n_elements) for t in model.tensors)


def four_bits_before(model: GGUFReader) -> bool:
    """Whether any 32 neighbours hold at most 16 values, in most matrices of the first layer."""
    matrices = [t for t in model.tensors if t.name.startswith("blk.0.") and len(t.shape) == 2]
    values = (torch.from_numpy(dequantize(t.data, t.tensor_type)) for t in matrices)
    return 2 * sum(most_values_in_32(matrix) <= 16 for matrix in values) > len(matrices)


def read_gguf(path: Path) -> GGUFReader:
    """Raises UserError if the file is cut short or no GGUF."""
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file; llama.cpp/export.py makes them")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, struct.error, OSError):
        size = f"{path.stat().st_size:,} bytes are less than its header says"
        raise UserError(f"{path}: cut short ({size}); copy or export it again") from None


def is_lora(reader: GGUFReader) -> bool:
    kind = reader.fields.get("general.type")
    return kind is not None and kind.contents() == "adapter"


def check_metadata(gguf_file: Path, adapter_folder: Path) -> None:
    """Raises UserError if chat template, stop token or BOS are not those of the adapter's tokenizer."""
    fields, tokenizer = GGUFReader(gguf_file).fields, load_tokenizer(adapter_folder)
    wanted = {
        "tokenizer.chat_template": tokenizer.chat_template,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.add_bos_token": adds_bos(tokenizer),
    }
    for key, ours in wanted.items():
        theirs = fields[key].contents() if key in fields else None
        if theirs is None and isinstance(ours, bool):
            continue  # then the tokenizer's kind decides; parity.py compares token ids
        if theirs != ours:
            values = f"{key} is {str(theirs)[:80]!r}, but the adapter's tokenizer has {str(ours)[:80]!r}"
            lost = "; copy chat_template.jinja from the base" if ours is None else ""
            raise UserError(f"{gguf_file.name}: {values}: answers would differ{lost}")


def check_pair(base: GGUFReader, lora: GGUFReader, name: str, adapter_weights: Path) -> None:
    """Raises UserError if the LoRA file `name` does not fit its base or has another adapter's matrices."""
    if is_lora(base) or not is_lora(lora):
        raise UserError(f"{name} is not a LoRA file; the order is BASE.gguf+LORA.gguf")
    shapes = {t.name: t.shape.tolist() for t in base.tensors}
    norms: dict[str, list[float]] = {"lora_A": [], "lora_B": []}
    for tensor in lora.tensors:
        target, which = tensor.name.rsplit(".", 1)
        side = "ab".index(which[-1])  # shapes are (in, out): A reads the base's inputs, B makes its outputs
        has, needs = shapes.get(target), tensor.shape.tolist()[side]
        if has is None or has[side] != needs:
            found = (
                f"{tensor.name} needs {needs} channels, the base has {has[side] if has else 'no such matrix'}"
            )
            raise UserError(f"{name} was made for another model: its {found}")
        norms[("lora_A", "lora_B")[side]].append(float(np.linalg.norm(tensor.data.astype(np.float32))))
    # Norms survive the converter's reordering of rows, so they tell adapters apart although names differ.
    with safe_open(adapter_weights, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for which, found in norms.items():
        ours = sorted(t.float().norm().item() for key, t in tensors.items() if which in key)
        if len(ours) != len(found) or not np.allclose(ours, sorted(found), rtol=1e-3, atol=1e-6):
            raise UserError(f"{name} is another adapter than {adapter_weights.parent}: its {which} differ")


def known_files(folder: Path) -> dict[str, dict]:
    """{file name: its kind ("merged", "base" or "lora"), type and origin}, as export.json has them."""
    try:
        files = json.loads((folder / RECORD).read_text())["files"]
        there = {name: what for name, what in files.items() if (folder / name).is_file()}
        return {name: what for name, what in there.items() if {"kind", "type", "of"} <= what.keys()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def own_files(folder: Path, adapter: Adapter) -> dict[str, dict]:
    """known_files() that were made from this very adapter, or are its base."""
    known = known_files(folder).items()
    return {name: what for name, what in known if what["of"] == origin(adapter, what["kind"])}


def origin(adapter: Adapter, kind: str) -> str:
    """What identifies a file's source: the base's revision, or the hashes of the adapter's files.

    A base in a plain folder has no revision: it is converted again for each adapter.
    """
    if kind == "base" and adapter.revision:
        return adapter.revision
    return "-".join(sha256_of(adapter.folder / name) for name in (WEIGHTS, CONFIG))


def place(file: Path, folder: Path, adapter: Adapter, what: dict) -> None:
    """Give a complete file its final name in `folder`, and record what it is.

    The record of an older file of this name goes first: an export that is killed in between leaves a file
    without a record, never a new file under an old one.
    """
    others = {name: known for name, known in known_files(folder).items() if name != file.name}
    write_json(folder / RECORD, {"files": others})
    publish(file, folder / file.name)
    if all(known["kind"] == "base" for known in own_files(folder, adapter).values()):
        for name in MODELFILES:  # this adapter is new here: what they name would be served in its place
            (folder / name).unlink(missing_ok=True)
    write_json(folder / RECORD, {"files": others | {file.name: what | {"of": origin(adapter, what["kind"])}}})
