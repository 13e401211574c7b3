"""The one loader: a model's name -> a quantized model with its tokenizer, checked."""

import contextlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from config import PRECISIONS, Precision
from qlora.cli import UserError, first_line
from qlora.files import read_json
from qlora.hardware import Hardware
from qlora.packed import METHODS as PACKED
from qlora.packed import PackedConfig, Packing, packed_layers, packing_of, unpack_model
from qlora.shapes import skeleton
from qlora.sources import LOCAL, check_folder, locate
from qlora.templates import refuse_endless
from qlora.weights import plain_tensors

# transformers warns of its own calls between two of its names for activation checkpointing.
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SIXTEEN_OR_MORE = tuple(name for name, options in PRECISIONS.items() if isinstance(options, str))
NEEDS_CODE = "it needs code of its author, which is never run here"


@dataclass(frozen=True)
class BaseInfo:
    """Which base an adapter belongs to; saved beside it and compared when it is used."""

    name: str  # what --model takes
    public_name: str  # hub id, or the local path: adapter_config.json's base_model_name_or_path
    revision: str  # hub commit, or sha256 of the GGUF file or of a plain folder's files; once ""
    precision: Precision
    dtype: str
    config_sha256: str


@dataclass
class Base:
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    info: BaseInfo
    hardware: Hardware

    @property
    def context_length(self) -> int:
        """Tokens that the model can read at once."""
        return getattr(self.model.config, "max_position_embeddings", 1 << 30)


def quantization_config(precision: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """bitsandbytes settings by config.PRECISIONS; None for what it does not quantize."""
    options = PRECISIONS[precision]
    if not isinstance(options, dict):
        return None
    if options.get("load_in_4bit"):
        options = {**options, "bnb_4bit_compute_dtype": compute_dtype}
    return BitsAndBytesConfig(**options)


def load_base(name: str, precision: str, hardware: Hardware, revision=None, quantization=None) -> Base:
    """Model on its device with its tokenizer.

    `revision` pins a hub commit; `quantization`, a BitsAndBytesConfig, replaces that of config.PRECISIONS.
    Raises UserError when the model can't be found, read or trusted.
    """
    folder, public_name, revision = locate(name, revision)
    config_sha256, dtype = check_folder(folder), PRECISIONS[precision]
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else hardware.dtype
    packing = check_precision(name, folder, precision)
    quantization = quantization or quantization_config(precision, dtype)
    with readable(name, folder):
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        if packing:  # read by qlora/packed.py, not by transformers' own way, which needs kernels
            del config.quantization_config
            quantization = PackedConfig(packing, packed_layers(folder))
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": hardware.loads_to},
            use_safetensors=True,
            **LOCAL,
        )
        if packing and precision not in PACKED:
            unpack_model(model)
    tokenizer = load_tokenizer(folder)
    if missing := sorted(found["missing_keys"]):  # transformers would fill them with random numbers
        which = f"no weights for {missing[0]} and {len(missing) - 1} more that its config.json names"
        raise UserError(f"{name}: {folder} has {which}; fetch it again")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{name}: the tokenizer in {folder} names no end token (eos_token); copy the base's files"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    never_repack(model)
    refuse_broken_weights(name, model)
    refuse_misread_rows(name, model)
    info = BaseInfo(name, public_name, revision, precision, str(dtype).removeprefix("torch."), config_sha256)
    return Base(model.eval(), tokenizer, info, hardware)


def check_precision(name: str, folder: Path, precision: str) -> Packing | None:
    """How a folder's GPTQ or AWQ weights are packed; raises UserError where it can't be held so."""
    config = read_json(folder / "config.json", "fetch it again")
    packing = packing_of(config.get("quantization_config"), folder)
    if packing is None and precision in PACKED:
        make = f"python quant_llama32_4bit_lora.py --model {name} --compare {precision} makes one that is"
        raise UserError(f"--precision {precision}: {name} is not quantized by {precision.upper()}; {make}")
    if packing and precision not in (packing.method, *SIXTEEN_OR_MORE):
        others = f"leave --precision out, or choose {', '.join(SIXTEEN_OR_MORE)} for its values in more bits"
        raise UserError(f"--precision {precision}: {name} is quantized by {packing.method}; {others}")
    return packing


@contextlib.contextmanager
def readable(name: str, folder: Path):
    """Turns what transformers raises on a damaged model folder into a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # a config can make any line of transformers fail
        text = str(error)
        if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate" in text:
            raise
        what = f"can't be loaded ({first_line(error)}); fetch it again"
        if "ignore_mismatched_sizes" in text:
            what = "can't be loaded: the weights have other sizes than config.json says; fetch both again"
        elif type(error).__name__ == "SafetensorError":
            what = f"can't be loaded: its weights are damaged or cut short ({first_line(error)}); fetch again"
        elif "trust_remote_code" in text:
            what = f"can't be loaded: {NEEDS_CODE}"
        raise UserError(f"{name}: the model in {folder} {what}") from None


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Raises UserError where its files are missing or broken, and for a chat template that does not end."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
        if tokenizer.chat_template is not None:  # of several by name, the default
            tokenizer.chat_template = tokenizer.get_chat_template()
    except Exception as error:  # the tokenizers library, written in Rust, raises Exception itself
        why = NEEDS_CODE if "trust_remote_code" in str(error) else first_line(error)
        raise UserError(f"{folder}: tokenizer files missing or broken ({why}); copy the base's") from None
    if tokenizer.chat_template is not None:
        refuse_endless(str(folder), tokenizer.chat_template)
    return tokenizer


def never_repack(model) -> None:
    """Keep bitsandbytes 0.50.2 from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    Its first evaluation would, training never unpacks them, and the packed path has no autograd: LoRA
    gradients are wrong from then on while the loss looks fine. The guard nothing_repacked checks it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def refuse_broken_weights(name: str, model) -> None:
    """Raise UserError for NaN, infinity and shapes that are not config.json's.

    transformers compares no shapes of layers that it quantizes. aminmax() needs no memory, unlike isfinite().
    """
    shapes = {key: parameter.shape for key, parameter in skeleton(model.config).named_parameters()}
    for key, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        found = tuple(state.shape if state is not None else parameter.shape)
        if key in shapes and found != tuple(shapes[key]):
            wanted = f"config.json says {tuple(shapes[key])}"
            raise UserError(f"{name}: {key} has the shape {found}, {wanted}; fetch both again")
        # What is packed into 4 bits is stored as numbers of some dtype, and is none of them.
        for tensor in plain_tensors(parameter if state is None else state):
            if tensor.is_floating_point() and not all(end.isfinite() for end in tensor.aminmax()):
                raise UserError(f"{name}: NaN or infinity in {key}; fetch it again")
    for key, buffer in model.named_buffers():
        if key.endswith(".scales") and not buffer.isfinite().all():  # of GPTQ and AWQ
            raise UserError(f"{name}: NaN or infinity in {key}; fetch it again")


def refuse_misread_rows(name: str, model) -> None:
    """bitsandbytes 0.50.2 on a CPU reads 4-bit rows that are not whole blocks wrong: 25% error, not 9%."""
    for layer, module in model.named_modules() if model.device.type == "cpu" else ():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and state.shape[-1] % state.blocksize:
            width = f"{layer} is {state.shape[-1]} wide, not a multiple of {state.blocksize}"
            raise UserError(f"{name}: {width}: a CPU reads 4 bits back wrong; use --precision int8 or bf16")
