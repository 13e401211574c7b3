"""One model in many precisions: 32 and 16 bits, bitsandbytes' types, torchao's."""

import dataclasses
import importlib.util

import torch

from config import COMPARABLE, PRECISIONS
from qlora.calibrated import calibrated_folder
from qlora.cli import UserError
from qlora.hardware import Hardware
from qlora.lab.rounded import SCHEMES, round_layers
from qlora.loading import Base, load_base, quantization_config
from qlora.packed import METHODS as PACKED
from qlora.shapes import model_config
from qlora.sources import locate
from qlora.weights import linear_layers

# Every product converts weights or activations without a fused kernel: a token takes 2 to 10 times as long.
SLOW_ON_CPU = ("torchao-int8dyn", "torchao-fp8")
CALIBRATED = {*PACKED, "int8-static"}  # what looks at training rows first
NAMED_ONLY = (*(name for name in SCHEMES if name != "int4"), *PACKED)  # on a CPU: the table stays short
# As bitsandbytes. torchao's own 128 silently leaves layers that it does not divide (576 wide) in 16 bits.
INT4_GROUP = 64


def default_precisions(hardware: Hardware) -> tuple[str, ...]:
    """On a GPU all but those that are written to models/. On a CPU those that run in reasonable time,
    torchao's only where it is installed.
    """
    if hardware.device != "cpu":
        return tuple(name for name in COMPARABLE if name not in PACKED)
    torchao = importlib.util.find_spec("torchao") is not None
    slow = (*SLOW_ON_CPU, *NAMED_ONLY)
    fast = [name for name in COMPARABLE if name not in slow and not emulated(name, hardware)]
    return tuple(name for name in fast if torchao or not name.startswith("torchao"))


def emulated(precision: str, hardware: Hardware) -> bool:
    """Whether the device has no arithmetic in this 16-bit type: it runs, converted at each product."""
    if precision == "fp16" and hardware.device == "cpu":
        return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return precision == "bf16" and hardware.dtype != torch.bfloat16


def named(dtype: torch.dtype | None) -> str:
    """torch.bfloat16 -> 'bf16'; a config without a dtype means 'fp32'."""
    return next((p for p, held in PRECISIONS.items() if held == str(dtype).removeprefix("torch.")), "fp32")


def load_source(name: str, hardware: Hardware) -> Base:
    """The model as its files hold it, on the CPU: what every precision is compared with."""
    config, _ = model_config(str(locate(name)[0]))
    return load_base(name, named(config.dtype), dataclasses.replace(hardware, device="cpu"))


def prepare(name: str, precision: str, hardware: Hardware, calibration, group: int) -> str:
    """The model to load: of gptq and awq a folder made of it, on `calibration`'s ids (rows, tokens)."""
    if precision not in PACKED:
        return name
    return str(calibrated_folder(load_base(name, "fp32", hardware), calibration, precision, group))


def load(name: str, precision: str, hardware: Hardware, calibration=()):
    """Model on its device, its linear layers in `precision`; head, embeddings and norms stay as they are.

    `calibration`: token ids of rows that static scales are measured on.
    """
    if precision in SCHEMES:
        model = load_base(name, named(hardware.dtype), hardware).model
        round_layers(model, SCHEMES[precision], calibration)
        return model
    if precision.startswith("torchao"):
        config = torchao_config(precision, hardware)
        from torchao.quantization import quantize_

        model = load_base(name, named(hardware.dtype), hardware).model
        layers = {layer for _, layer in linear_layers(model)}
        quantize_(model, config, filter_fn=lambda module, name: module in layers)
        return model
    if precision == "nf4-dq":
        return load_base(name, "nf4", hardware).model
    single = None
    if precision in ("nf4", "fp4"):
        # Double quantization is always on elsewhere in this repository; here it is a row of its own.
        single = quantization_config(precision, hardware.dtype)
        single.bnb_4bit_use_double_quant = False
    return load_base(name, precision, hardware, quantization=single).model


def torchao_config(precision: str, hardware: Hardware):
    """What torchao.quantization.quantize_ takes; raises UserError where torchao is not installed."""
    try:
        from torchao import quantization as ao
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    except ImportError:
        raise UserError("torchao is not installed: pip install torchao") from None
    if precision == "torchao-int4wo" and hardware.device == "cpu":  # the one below has kernels for GPUs only
        return PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP, set_inductor_config=False)
    # int4: the plain packing needs a further library (mslk); this one needs compute capability 8.0.
    tiles = {"group_size": INT4_GROUP, "int4_packing_format": "tile_packed_to_4d"}
    kind, options = {
        "torchao-int8wo": (ao.Int8WeightOnlyConfig, {}),
        "torchao-int8dyn": (ao.Int8DynamicActivationInt8WeightConfig, {}),
        "torchao-int4wo": (ao.Int4WeightOnlyConfig, tiles),
        "torchao-fp8": (ao.Float8WeightOnlyConfig, {}),  # E4M3, products in 16 bits: no fp8 arithmetic needed
    }[precision]
    return kind(set_inductor_config=False, **options)
