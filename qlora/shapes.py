"""A model's config without its weights, and its skeleton on the meta device: shapes without data."""

import contextlib
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from config import BUNDLED, MODELS
from qlora.cli import UsageError, UserError, first_line
from qlora.hub import config_file
from qlora.packed import METHODS as PACKED
from qlora.sources import HUB_ID, LOCAL, locate, read_config

SHAPES = json.loads(Path(__file__).with_name("shapes.json").read_text())


def model_config(name: str):
    """(transformers config, where it came from) of anything that --model takes; reads no weights.

    Raises UsageError where there is no such model, UserError where its config can't be read.
    """
    preset = {hub_id: key for key, hub_id in MODELS.items()}.get(name, name)
    if preset in SHAPES:
        return AutoConfig.for_model(**SHAPES[preset]), f"preset {preset} (qlora/shapes.json)"
    path = locate(name)[0] if name.lower().endswith(".gguf") else Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists() and HUB_ID.fullmatch(name) and path.suffix != ".json":
        path = config_file(name)
    if path.suffix != ".json" or not path.is_file():
        known = f"a config.json or its folder, a .gguf file, a hub id or a preset ({', '.join(SHAPES)})"
        raise UsageError(f"--model {name}: not found; expected {known}")
    read_config(path)
    try:
        return AutoConfig.from_pretrained(path, **LOCAL), str(path)
    except Exception as error:  # a config can make any line of transformers fail
        raise UserError(f"{path}: not a config that transformers can read ({first_line(error)})") from None


def peek(name: str):
    """A model's config, or None where it can't be had: what loads it will say why."""
    with contextlib.suppress(UserError, OSError):
        return model_config(name)[0]


def widths(config) -> tuple[int, int]:
    """Of a model's hidden states and of its MLP; the bundled model's where there is no telling."""
    with contextlib.suppress(AttributeError):
        return config.hidden_size, config.intermediate_size
    return widths(peek(BUNDLED))


def stored_precision(config) -> str:
    """gptq or awq where that is how a model's files hold it, else nf4: what --precision auto stands for."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else None
    return method if method in PACKED else "nf4"


def skeleton(config, dtype: torch.dtype = torch.bfloat16):
    """The model on the meta device: modules, shapes and dtypes without weights."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"a {config.model_type} model is not a causal language model, as needed here")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False).eval()
