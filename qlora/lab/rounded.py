"""Linear layers in formats that need no library: int4, MXFP4, NVFP4, and int8 with scales for activations.

Weights are held as packed codes and scales, and read back at each product; a kernel made for a format would
do that inside. So bytes and errors are the format's own, and speed is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.cli import UserError
from qlora.lab.formats import encode_int8, look_up
from qlora.logits import hidden_states
from qlora.packed import from_bytes, to_bytes
from qlora.qat import LARGEST_E4M3
from qlora.weights import linear_layers

# E2M1's numbers in the order of their codes: sign, two bits of exponent, one of mantissa.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True)
class Scheme:
    """How a layer is held, and how its input is rounded: not at all, or to int8 by a scale per token
    (dynamic) or one for all that was measured beforehand (static)."""

    kind: str  # int4, int4-sym, mxfp4, nvfp4 or int8
    group: int = 0  # neighbours that share a scale; 0: a whole row
    activations: str | None = None


SCHEMES = {
    "int4": Scheme("int4", 32),
    "int4-g64": Scheme("int4", 64),
    "int4-sym": Scheme("int4-sym", 32),
    "int4-sym-g64": Scheme("int4-sym", 64),
    "mxfp4": Scheme("mxfp4", 32),  # Open Compute's Microscaling (MX) specification 1.0
    "nvfp4": Scheme("nvfp4", 16),  # NVIDIA's: Blackwell multiplies in it
    "int8-dynamic": Scheme("int8", activations="dynamic"),
    "int8-static": Scheme("int8", activations="static"),
    "w4a8": Scheme("int4-sym", 32, activations="dynamic"),
}


def encode_e2m1(scaled: Tensor) -> Tensor:
    """Codes of the nearest E2M1 numbers, at most 6; a tie goes to the even code, as in IEEE 754."""
    size, code = scaled.abs(), torch.zeros_like(scaled, dtype=torch.uint8)
    for i, midpoint in enumerate(E2M1_MIDPOINTS):
        code += size >= midpoint if i % 2 else size > midpoint
    return code + 8 * (scaled < 0).to(torch.uint8)


def decode_e2m1(code: Tensor) -> Tensor:
    return look_up(torch.cat((E2M1, -E2M1)).to(code.device), code)


def encode(weight: Tensor, scheme: Scheme) -> dict[str, Tensor]:
    """What is held of a weight (out, in): codes, scales and what else it takes to read them back."""
    if scheme.kind == "int8":
        codes, largest = encode_int8(weight.float())
        return {"codes": codes, "scales": largest / 127}
    blocks = weight.float().reshape(len(weight), -1, scheme.group)
    largest = blocks.abs().amax(-1, keepdim=True)
    if scheme.kind == "int4-sym":  # -7 to 7
        scales = (largest / 7).half()
        codes = (blocks / divisor(scales)).round().clamp(-7, 7) + 8
        held = {"scales": scales}
    elif scheme.kind == "int4":  # 0 to 15 around a zero that is one of them: a zero weight stays zero
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        scales = ((high - low) / 15).half()
        zeros = (-low / divisor(scales)).round().clamp(0, 15)
        codes = ((blocks / divisor(scales)).round() + zeros).clamp(0, 15)
        zeros = F.pad(zeros.flatten().to(torch.uint8), (0, zeros.numel() % 2))
        held = {"scales": scales, "zeros": to_bytes(zeros)}
    elif (
        scheme.kind == "mxfp4"
    ):  # a power of two for 32 numbers; the largest lies between 4 and 8 and is cut to 6
        exponents = largest.clamp(min=2.0**-120).log2().floor() - 2
        codes = encode_e2m1(blocks / 2**exponents)
        held = {"scales": (exponents + 127).to(torch.uint8)}
    else:  # nvfp4: an E4M3 number for 16 numbers, and an fp32 one for the matrix
        whole = (largest.max() / (6 * LARGEST_E4M3)).clamp(min=1e-38)
        scales = (largest / 6 / whole).to(torch.float8_e4m3fn)
        codes = encode_e2m1(blocks / divisor(scales.float() * whole))
        held = {"scales": scales, "whole": whole}
    return {"codes": to_bytes(codes.to(torch.uint8).flatten(1)), **held}


def divisor(scales: Tensor) -> Tensor:
    """Scales in fp32; 1 where a block is zero, or too small for its scale's format."""
    scales = scales.float()
    return torch.where(scales == 0, 1.0, scales)


def decode(held: dict[str, Tensor], scheme: Scheme) -> Tensor:
    """The weight (out, in) in fp32 that encode()'s result stands for."""
    if scheme.kind == "int8":
        return held["codes"] * held["scales"]
    codes, scales = from_bytes(held["codes"]), held["scales"]
    codes = codes.view(len(codes), -1, scheme.group)
    if scheme.kind == "int4-sym":
        values = (codes.float() - 8) * scales.float()
    elif scheme.kind == "int4":
        zeros = from_bytes(held["zeros"])[: scales.numel()].view(scales.shape)
        values = (codes.float() - zeros.float()) * scales.float()
    elif scheme.kind == "mxfp4":
        values = decode_e2m1(codes) * 2.0 ** (scales.float() - 127)
    else:
        values = decode_e2m1(codes) * (scales.float() * held["whole"])
    return values.flatten(1)


class RoundedLinear(torch.nn.Linear):
    """A linear layer held by a scheme; its `weight` is made at each use."""

    def __init__(self, layer: torch.nn.Linear, scheme: Scheme, limit: float | None = None):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.scheme, self.dtype = scheme, layer.weight.dtype
        for name, tensor in encode(layer.weight.detach(), scheme).items():
            self.register_buffer(f"held_{name}", tensor, persistent=False)
        if limit is not None:
            self.register_buffer("limit", torch.tensor(limit, device=layer.weight.device), persistent=False)

    @property
    def weight(self) -> Tensor:
        held = {name.removeprefix("held_"): t for name, t in self._buffers.items() if name != "limit"}
        return decode(held, self.scheme).to(self.dtype)

    def forward(self, x):
        if self.scheme.activations is None:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, self.in_features).float()
        if self.scheme.activations == "static":  # what is larger than anything seen before is cut
            largest = self.limit
            codes = (rows * (127 / largest)).round().clamp(-127, 127).to(torch.int8)
        else:
            codes, largest = encode_int8(rows)
        if self.scheme.kind == "int8":  # whole numbers are multiplied, and summed in 32 bits
            y = int8_product(codes, self.held_codes) * (largest / 127) * self.held_scales.t()
        else:  # four bits by eight, which no processor multiplies: the values that they stand for
            y = (codes * (largest / 127)) @ self.weight.float().t()
        y = y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of int8 (rows, n) and (out, n), summed in int32. CUDA's product wants more than 16 rows."""
    padded = F.pad(a, (0, 0, 0, max(0, 32 - len(a)))) if a.is_cuda else a
    return torch._int_mm(padded, b.t())[: len(a)]


def round_layers(model, scheme: Scheme, calibration: Sequence[Sequence[int]] = ()) -> None:
    """Replace the linear layers but the head; `calibration`: token ids of rows for static scales."""
    layers = linear_layers(model)
    limits = largest_inputs(model, calibration) if scheme.activations == "static" else {}
    for name, layer in layers:
        if scheme.group and layer.in_features % scheme.group:
            raise UserError(
                f"groups of {scheme.group} do not divide the {layer.in_features} inputs of {name}"
            )
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, RoundedLinear(layer, scheme, limits.get(name)))


@torch.no_grad()
def largest_inputs(model, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """The largest absolute value that each linear layer reads on these rows."""
    seen: dict[str, float] = {}

    def watch(name: str):
        def before(module, arguments) -> None:
            seen[name] = max(seen.get(name, 0.0), arguments[0].abs().max().item())

        return before

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in linear_layers(model)]
    try:
        for ids in rows:
            hidden_states(model, torch.tensor([list(ids)], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
