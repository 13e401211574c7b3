"""GGUF files from the outside: types by name, size, whether one is whole, fits its partner and speaks as its model was trained to."""

from __future__ import annotations

from pathlib import Path

from qlora.cli import UsageError, UserError


def canonical(kind: str) -> str:
    """'q8_0' -> 'Q8_0', 'F16' -> 'f16'; raises UsageError for what llama-quantize does not know."""
    from gguf import LlamaFileType

    known = [t.name.removeprefix("MOSTLY_").removeprefix("ALL_") for t in LlamaFileType if t.name != "GUESSED"]
    if kind.upper() not in known:
        raise UsageError(f"--types {kind}: no type of llama-quantize; the usual ones: f16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_0")
    return kind.lower() if kind.upper() in ("F16", "BF16", "F32") else kind.upper()


def file_type(reader) -> str:
    """'Q8_0' for MOSTLY_Q8_0"""
    from gguf import LlamaFileType

    field = reader.fields.get("general.file_type")
    try:
        return canonical(LlamaFileType(field.contents()).name.removeprefix("MOSTLY_").removeprefix("ALL_"))
    except (AttributeError, ValueError, UsageError):
        return "unknown"


def file_bytes(path: Path) -> str:
    """'144.8 MB, 8.61 bits per weight': all of the file's bytes over its weights"""
    from gguf import GGUFReader

    weights = sum(int(t.n_elements) for t in GGUFReader(path).tensors)
    size = path.stat().st_size
    return f"{size / 1e6:.1f} MB, {8 * size / weights:.2f} bits per weight"


def read_gguf(path: Path):
    """A GGUFReader of a file that is whole; raises UserError if it is cut short or no GGUF."""
    import struct

    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path}: not a GGUF file (it does not begin with the letters GGUF); llama.cpp/export.py makes them")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, struct.error, OSError):
        raise UserError(f"{path}: cut short ({path.stat().st_size:,} bytes are less than its header promises); copy or export it again") from None


def is_lora(reader) -> bool:
    kind = reader.fields.get("general.type")
    return kind is not None and kind.contents() == "adapter"


def adapter_tokenizer(folder: Path):
    """The tokenizer saved with an adapter; raises UserError where its files are incomplete."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: its tokenizer files are incomplete or broken (tokenizer.json, tokenizer_config.json); copy them there from the base") from None


def check_metadata(gguf_file: Path, tokenizer_folder: Path) -> None:
    """The file's chat template, stop token and BOS behaviour are those of the tokenizer that trained; raises UserError."""
    from gguf import GGUFReader

    from qlora.ollama import adds_bos

    fields = GGUFReader(gguf_file).fields
    value = lambda key: fields[key].contents() if key in fields else None  # noqa: E731
    tokenizer = adapter_tokenizer(tokenizer_folder)
    if tokenizer.chat_template is None and "tokenizer.chat_template" in fields:
        raise UserError(f"{tokenizer_folder}: its tokenizer has no chat template, {gguf_file.name} has one; copy chat_template.jinja there from the base")
    wanted = {
        "tokenizer.chat_template": tokenizer.chat_template,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.add_bos_token": adds_bos(tokenizer),
    }
    for key, should in wanted.items():
        found = value(key)
        if found is None and isinstance(should, bool):
            continue  # then the tokenizer's kind decides; parity.py compares token ids
        if (bool(found) if isinstance(should, bool) else found) != should:
            raise UserError(f"{gguf_file.name}: {key} is {str(found)[:80]!r}, the adapter's tokenizer has {str(should)[:80]!r}: answers would differ")


def check_pair(base, lora, name: str, adapter_weights: Path) -> None:
    """A LoRA file (its reader, and the `name` to call it by) fits its base and holds the matrices of the adapter that is meant; raises UserError."""
    import numpy as np

    shapes = {t.name: t.shape.tolist() for t in base.tensors}
    norms = {"lora_A": [], "lora_B": []}
    if is_lora(base) or not is_lora(lora):
        raise UserError(f"{name} is no LoRA file; the order is BASE.gguf+LORA.gguf")
    for tensor in lora.tensors:
        target, which = tensor.name.rsplit(".", 1)
        inner = 0 if which == "lora_a" else 1
        have, want = shapes.get(target), tensor.shape.tolist()[0 if which == "lora_a" else 1]
        if have is None or have[inner] != want:
            raise UserError(f"{name} was made for another model: its {tensor.name} wants {want} channels, the base has {have[inner] if have else 'no such matrix'}")
        norms["lora_A" if which == "lora_a" else "lora_B"].append(float(np.linalg.norm(tensor.data.astype(np.float32))))
    # Norms survive the converter's reordering of rows, so they tell adapters apart without knowing its names.
    for which, wanted in adapter_norms(adapter_weights).items():
        if len(wanted) != len(norms[which]) or not np.allclose(sorted(wanted), sorted(norms[which]), rtol=1e-3, atol=1e-6):
            raise UserError(f"{name} holds another adapter than {adapter_weights.parent}: its {which} matrices differ")


def adapter_norms(path: Path) -> dict[str, list[float]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {which: [file.get_tensor(name).float().norm().item() for name in file.keys() if which in name] for which in ("lora_A", "lora_B")}
