"""GPTQ and AWQ: linear layers held as whole numbers of a few bits, with a scale and a zero for each group.

Both formats are read here, not by their own kernels: those want a GPU, or repack the codes at the first
evaluation and can't be trained on from then on. Here one matrix at a time is spelled out, in the forward pass
and again in the backward pass, so that LoRA trains on it as on NF4.

Formats: AutoGPTQ's and AutoAWQ's "gemm", as transformers and vLLM read them. Papers: arXiv:2210.17323 (GPTQ),
arXiv:2306.00978 (AWQ).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora.cli import UserError

BITS = {"gptq": (4, 8), "awq": (4,)}  # that are read
METHODS = tuple(BITS)
# AWQ writes eight codes of 4 bits into 32 in this order, which suits a GPU's instructions.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Packing:
    """How one model's layers are packed: its config's quantization_config, checked."""

    method: str  # gptq or awq
    bits: int
    group: int  # inputs that share a scale; 0: all of a row
    zero_offset: int = 0  # AutoGPTQ's first format stores zero - 1


def packing_of(found: dict | None, where) -> Packing | None:
    """From a config's quantization_config; None if it names neither. UserError for what is not read."""
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method not in METHODS:
        return None
    bits, group, head = found.get("bits"), found.get("group_size", -1), found.get("lm_head")
    kind = str(found.get("checkpoint_format") or found.get("version") or method).lower()
    read = {"gptq": ("gptq", "gptq_v2"), "awq": ("awq", "gemm")}[method]
    if kind not in read or bits not in BITS[method] or type(group) is not int or head:
        what = f"{method} as {kind}, {bits} bits, groups of {group}{', the head as well' if head else ''}"
        fix = "read are gptq of 4 or 8 bits and awq's gemm of 4; take the model in 16 bits"
        raise UserError(f"{where}: its weights are {what}; {fix}")
    return Packing(method, bits, max(0, group), int(kind == "gptq"))


def pack(codes: Tensor, bits: int, order=None) -> Tensor:
    """Codes (n, columns) -> int32 (n * bits / 32, columns): neighbours in a column share a number."""
    each = 32 // bits
    codes = codes.to(torch.int64).view(-1, each, codes.shape[1])[:, order or range(each)]
    shifts = torch.arange(0, 32, bits, device=codes.device)[None, :, None]
    # Fields do not overlap, so the sum is their union; the highest bit is int32's sign.
    return (codes << shifts).sum(1).to(torch.int32)


def unpack(packed: Tensor, bits: int, order=None) -> Tensor:
    """What pack() packed: (n * bits / 32, columns) int32 -> (columns, n) uint8."""
    codes = from_bytes(
        packed.t().contiguous().view(torch.uint8), bits
    )  # little-endian, as all that torch runs on
    if order is None:
        return codes
    back = sorted(range(len(order)), key=order.__getitem__)
    return codes.unflatten(1, (-1, len(order)))[..., back].flatten(1)


def to_bytes(codes: Tensor, bits: int = 4) -> Tensor:
    """Codes (…, n), uint8 -> bytes (…, n * bits / 8); of two codes in a byte the first is the lower half."""
    return codes if bits == 8 else codes[..., ::2] | (codes[..., 1::2] << 4)


def from_bytes(held: Tensor, bits: int = 4) -> Tensor:
    """What to_bytes() packed, each code in a byte of its own again."""
    return held if bits == 8 else torch.stack((held & 15, held >> 4), -1).flatten(-2)


class PackedLinear(torch.nn.Linear):
    """A linear layer of codes, two in a byte if they have 4 bits; `weight` (out, in) is made at each use."""

    def __init__(self, outputs: int, inputs: int, bias, packing: Packing, dtype: torch.dtype, device=None):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bits, self.dtype = inputs, outputs, packing.bits, dtype
        self.bias, groups, here = bias, inputs // (packing.group or inputs), {"device": device}
        codes = torch.empty(outputs, inputs * packing.bits // 8, dtype=torch.uint8, **here)
        self.register_buffer("codes", codes)
        self.register_buffer("zeros", torch.empty(outputs, groups, dtype=torch.uint8, **here))
        self.register_buffer("scales", torch.empty(outputs, groups, dtype=torch.float16, **here))
        # The group of each input, where act-order has put neighbours into different ones.
        self.register_buffer("group_of", None)

    @property
    def weight(self) -> Tensor:
        codes, zeros, scales = from_bytes(self.codes, self.bits), self.zeros.float(), self.scales.float()
        if self.group_of is not None:
            return ((codes - zeros[:, self.group_of]) * scales[:, self.group_of]).to(self.dtype)
        values = codes.unflatten(1, (scales.shape[1], -1)).float()
        return values.sub_(zeros[..., None]).mul_(scales[..., None]).flatten(1).to(self.dtype)

    def forward(self, x):
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    """x W^T; the backward pass makes W again, so that no matrix is kept in between."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


class Stored(torch.nn.Module):
    """A layer's tensors as the file names them, until all are loaded."""

    def __init__(self, layer: torch.nn.Linear, packing: Packing):
        super().__init__()
        inputs, outputs, each = layer.in_features, layer.out_features, 32 // packing.bits
        groups, gptq = inputs // (packing.group or inputs), packing.method == "gptq"
        here = {"device": layer.weight.device}
        codes = (inputs // each, outputs) if gptq else (inputs, outputs // each)
        self.register_buffer("qweight", torch.empty(codes, dtype=torch.int32, **here))
        self.register_buffer("qzeros", torch.empty(groups, outputs // each, dtype=torch.int32, **here))
        self.register_buffer("scales", torch.empty(groups, outputs, dtype=torch.float16, **here))
        if gptq:
            self.register_buffer("g_idx", torch.empty(inputs, dtype=torch.int32, **here))
        self.bias, self.packing, self.dtype = layer.bias, packing, layer.weight.dtype
        self.in_features, self.out_features = inputs, outputs

    def unpacked(self) -> PackedLinear:
        packing, bits = self.packing, self.packing.bits
        shape = self.out_features, self.in_features
        layer = PackedLinear(*shape, self.bias, packing, self.dtype, "meta")
        if packing.method == "awq":
            codes, zeros = (unpack(t.t(), bits, AWQ_ORDER).t() for t in (self.qweight, self.qzeros))
        else:
            codes, zeros = unpack(self.qweight, bits), unpack(self.qzeros.t(), bits).t()
            zeros = (zeros + packing.zero_offset) & (2**bits - 1)
            if self.g_idx.min() < 0 or self.g_idx.max() >= len(self.scales):
                raise UserError(
                    f"g_idx names a group beyond the {len(self.scales)} there are; fetch it again"
                )
            if not torch.equal(self.g_idx, in_turn(self.in_features, len(self.scales), self.g_idx)):
                layer.group_of = self.g_idx
        layer.codes = to_bytes(codes, bits).contiguous()
        layer.zeros, layer.scales = zeros.contiguous(), self.scales.t().contiguous()
        return layer


def in_turn(inputs: int, groups: int, like: Tensor) -> Tensor:
    """The group of each input where groups are neighbours: 0 0 0 1 1 1 …"""
    return torch.arange(inputs, dtype=like.dtype, device=like.device) // (inputs // groups)


def packed_tensors(codes: Tensor, scales: Tensor, zeros: Tensor, packing: Packing) -> dict[str, Tensor]:
    """What a file holds of a layer with these codes (out, in), scales and zeros (out, groups), by name."""
    bits, zeros = packing.bits, (zeros - packing.zero_offset) & (2**packing.bits - 1)
    scales = scales.t().contiguous().half()
    if packing.method == "awq":
        codes, zeros = (pack(t, bits, AWQ_ORDER).t().contiguous() for t in (codes, zeros))
        return {"qweight": codes, "qzeros": zeros, "scales": scales}
    qzeros = pack(zeros, bits).t().contiguous()
    groups = in_turn(codes.shape[1], len(scales), qzeros)
    return {"qweight": pack(codes.t(), bits), "qzeros": qzeros, "scales": scales, "g_idx": groups}


def packed_layers(folder: Path) -> set[str]:
    """Names of the layers whose codes a folder's files hold; the others are plain."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {key.removesuffix(".qweight") for key in file.keys() if key.endswith(".qweight")}  # noqa: SIM118
    return names


@register_quantization_config("packed")
class PackedConfig(QuantizationConfigMixin):
    """For from_pretrained(): a folder's packing, and which of its layers are packed."""

    def __init__(self, packing: Packing, layers: set[str]):
        self.quant_method, self.packing, self.layers = "packed", packing, sorted(layers)


@register_quantizer("packed")
class PackedQuantizer(HfQuantizer):
    """Holds the place of each packed layer until transformers has loaded its tensors as all others."""

    is_trainable = True

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model, **_) -> None:
        given = self.quantization_config
        for name, layer in chosen_layers(model, given.layers, given.packing):
            replace_layer(model, name, Stored(layer, given.packing))

    def _process_model_after_weight_loading(self, model, **_) -> None:
        for name, stored in list(model.named_modules()):
            if isinstance(stored, Stored):
                replace_layer(model, name, stored.unpacked())


def chosen_layers(model, names, packing: Packing) -> list[tuple[str, torch.nn.Linear]]:
    """(name, layer) of those that are packed; raises UserError where groups do not fit one."""
    chosen = [(name, layer) for name, layer in model.named_modules() if name in names]
    for name, layer in chosen:
        if layer.in_features % (packing.group or layer.in_features):
            what = f"groups of {packing.group} do not divide the {layer.in_features} inputs of {name}"
            raise UserError(f"its quantization_config: {what}")
    return chosen


def pack_layers(model, names, packing: Packing) -> None:
    """Put layers without values, but of the right size, in the place of these (for a memory plan)."""
    for name, layer in chosen_layers(model, names, packing):
        shape, at = (layer.out_features, layer.in_features), layer.weight.device
        replace_layer(model, name, PackedLinear(*shape, layer.bias, packing, layer.weight.dtype, at))


def replace_layer(model, name: str, layer) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def unpack_model(model) -> None:
    """Make every packed layer a plain one in the model's dtype, with the values that its codes stand for."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            weight = layer.weight
            plain = torch.nn.Linear(*weight.shape[::-1], bias=layer.bias is not None, device="meta")
            plain.weight, plain.bias = torch.nn.Parameter(weight), layer.bias
            replace_layer(model, name, plain)
    model.hf_quantizer.remove_quantization_config(model)
