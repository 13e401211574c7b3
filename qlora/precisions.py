"""One model in many precisions: 32 and 16 bits, bitsandbytes' types, torchao's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from config import COMPARABLE
from qlora.cli import UserError
from qlora.hardware import Hardware
from qlora.loading import DTYPES, never_repack, quantization_config, readable, refuse_misread_rows
from qlora.weights import linear_layers

# Every product converts weights or activations, without a fused kernel: a token takes 2 to 10 times as long as in bf16.
SLOW_ON_CPU = ("torchao-int8dyn", "torchao-fp8")
INT4_GROUP = 64  # as bitsandbytes' blocks; torchao's own 128 leaves layers that it does not divide (576 wide) in 16 bits, without a word


def default_precisions(hardware: Hardware) -> tuple[str, ...]:
    """All on a GPU. On a CPU what runs in reasonable time, and torchao's rows where it is installed."""
    if hardware.device != "cpu":
        return COMPARABLE
    installed = importlib.util.find_spec("torchao") is not None
    return tuple(name for name in COMPARABLE if name not in SLOW_ON_CPU and not emulated(name, hardware)
                 and (installed or not name.startswith("torchao")))


def emulated(precision: str, hardware: Hardware) -> bool:
    """Whether the device has no arithmetic in this 16-bit type: it runs, converted at each product."""
    if precision == "fp16" and hardware.device == "cpu":
        return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return precision == "bf16" and hardware.dtype != torch.bfloat16


def load(folder: Path, precision: str, hardware: Hardware):
    """Model on its device, its linear layers in `precision`; head, embeddings and norms stay as they are computed with."""
    torchao = torchao_config(precision, hardware) if precision.startswith("torchao") else None
    dtype = DTYPES.get(precision, hardware.dtype)
    config = quantization_config("nf4" if precision == "nf4-dq" else precision, dtype)
    if precision in ("nf4", "fp4"):
        config.bnb_4bit_use_double_quant = False  # elsewhere in this repository always on; here it is a row of its own
    with readable(folder.name, folder):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=config, device_map={"": hardware.device}, use_safetensors=True, local_files_only=True
        ).eval()
    never_repack(model)
    refuse_misread_rows(folder.name, model)
    model.generation_config = GenerationConfig()  # no end token: every precision decodes as many
    if torchao:
        from torchao.quantization import quantize_

        layers = {layer for _, layer in linear_layers(model)}
        quantize_(model, torchao, filter_fn=lambda module, name: module in layers)
    return model


def torchao_config(precision: str, hardware: Hardware):
    """What torchao.quantization.quantize_ takes; raises UserError where torchao is not installed."""
    try:
        from torchao import quantization as ao
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    except ImportError:
        raise UserError("torchao is not installed: pip install torchao") from None
    if precision == "torchao-int4wo" and hardware.device == "cpu":  # the one below has kernels for GPUs only
        return PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP, set_inductor_config=False)
    kind, options = {
        "torchao-int8wo": (ao.Int8WeightOnlyConfig, {}),
        "torchao-int8dyn": (ao.Int8DynamicActivationInt8WeightConfig, {}),
        # The plain packing needs a further library (mslk); this one needs compute capability 8.0.
        "torchao-int4wo": (ao.Int4WeightOnlyConfig, {"group_size": INT4_GROUP, "int4_packing_format": "tile_packed_to_4d"}),
        "torchao-fp8": (ao.Float8WeightOnlyConfig, {}),  # E4M3, products in 16 bits: no fp8 arithmetic needed
    }[precision]
    return kind(set_inductor_config=False, **options)
