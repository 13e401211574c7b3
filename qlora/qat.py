"""Quantization-aware LoRA: layers whose merged weight W + s B A goes through a deployed type's grid.

An adapter trained like that has seen the rounding that its file will get. Its matrices are plain LoRA's, and
PEFT loads them anywhere; qlora.json says through which grid they were trained. Only layers with an adapter
are rounded, never embeddings and head.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from qlora.cli import UsageError, require
from qlora.weights import dequantized

BLOCK = 32  # neighbours that share a scale
LARGEST_E4M3 = 448.0
CHUNK = 1 << 22  # weights rounded at once: 16 MB in fp32, and a few times that on the way


def inverse(scales: torch.Tensor) -> torch.Tensor:
    """1 / scales; 0 where that is infinite: such a scale is zero in fp16, too."""
    return torch.where((1 / scales).isfinite(), 1 / scales, 0)


def first_of_largest(x: torch.Tensor) -> torch.Tensor:
    """The value of largest magnitude in each row of `x` (rows, width), the first of equals -> (rows, 1)."""
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    if isinstance(x, FakeTensor) or (high == -low).any():
        return x.gather(1, x.abs().argmax(1, keepdim=True))
    return torch.where(high > -low, high, low)  # argmax takes as long as all else of the rounding


def q4_0(weight: torch.Tensor) -> torch.Tensor:
    """GGUF's: 16 levels from -8 d to 7 d; -8 d is the value of largest magnitude, the first of equals."""
    x = weight.reshape(-1, BLOCK)
    d = first_of_largest(x) / -8
    codes = (x * inverse(d)).add_(8.5).floor_().clamp_(0, 15).sub_(8)
    return codes.mul_(d.half().float()).view_as(weight)


def q8_0(weight: torch.Tensor) -> torch.Tensor:
    """GGUF's: whole multiples of d = the largest magnitude / 127, halves rounded away from zero."""
    x = weight.reshape(-1, BLOCK)
    d = x.abs().amax(1, keepdim=True) / 127
    scaled = x * inverse(d)
    size = scaled.abs()
    whole = size.floor()
    codes = whole.add_(size.sub_(whole).mul_(2).floor_()).mul_(scaled.sign_())
    return codes.mul_(d.half().float()).view_as(weight)


def int4(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric: 15 levels from -7 d to 7 d, d in fp16; the row int4-sym of `--compare`."""
    x = weight.reshape(-1, BLOCK)
    d = (x.abs().amax(1, keepdim=True) / 7).half().float()
    codes = (x / torch.where(d == 0, 1, d)).round_().clamp_(-7, 7)
    return codes.mul_(d).view_as(weight)


def fp8(weight: torch.Tensor) -> torch.Tensor:
    """E4M3 numbers, the largest of each row at 448: what GPUs from compute capability 8.9 multiply with."""
    scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST_E4M3
    return (weight / scales).clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn).float().mul_(scales)


# A weight (out, in) in fp32 -> the values in fp32 that are read back once it is stored in this type.
GRIDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": q4_0,
    "Q8_0": q8_0,
    "int4": int4,
    "fp8": fp8,
}


def unchanged(now: torch.Tensor, before: torch.Tensor) -> bool:
    return not isinstance(now, FakeTensor) and now.shape == before.shape and torch.equal(now, before)


class Rounded(torch.autograd.Function):
    """y = x R^T + bias, where R = grid(W + s B A); the gradient passes the rounding as if it were not there.

    That gives dL/d(s B A) = dy^T x, and by the chain rule A's and B's gradients from products with r columns:
    the gradient of the whole weight is never made.
    """

    @staticmethod
    def forward(ctx, x, rounded, bias, a, b, scaling):
        ctx.save_for_backward(x, rounded, a, b)
        ctx.scaling = scaling
        # As PEFT: LoRA's products in the dtype of A and B, but under autocast in its 16 bits.
        ctx.dtype = x.dtype if torch.is_autocast_enabled(x.device.type) else a.dtype
        return F.linear(x, rounded, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, rounded, a, b = ctx.saved_tensors
        dx = dy @ rounded if ctx.needs_input_grad[0] else None
        rows, dy = (t.reshape(-1, t.shape[-1]).to(ctx.dtype) for t in (x, dy))
        low, back = rows @ a.to(ctx.dtype).t(), dy @ b.to(ctx.dtype)  # (rows, r)
        da, db = back.t() @ rows, dy.t() @ low
        return dx, None, None, da.to(a.dtype) * ctx.scaling, db.to(b.dtype) * ctx.scaling, None


class GridLinear(Linear):
    """PEFT's LoRA layer. Adapters named in `grids` compute with the rounded merged weight, others as ever."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.grids: dict[str, str] = {}  # adapter -> a name in GRIDS
        self._how, self._made_of = None, ()  # of what, as copies, and how `_rounded` was made
        self._rounded = torch.empty(0)

    def forward(self, x, *args, **kwargs):
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if self.disable_adapters or self.merged or name not in self.grids:
            return super().forward(x, *args, **kwargs)
        if kwargs.get("adapter_names") is not None:
            raise ValueError("an adapter trained through a grid can't share a batch with others")
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        bias = self.get_base_layer().bias
        bias = None if bias is None else bias.to(dtype)
        y = Rounded.apply(x.to(dtype), self.rounded(name, dtype), bias, a, b, self.scaling[name])
        return y.to(x.dtype)

    def rounded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """grid(W + s B A) (out, in), made again only where A or B has changed since.

        They are compared with copies: torch's counter of writes misses those of its fused AdamW.
        """
        a, b, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        how = (self.grids[name], scaling, dtype, a.device)
        if how == self._how and all(map(unchanged, (b, a), self._made_of)):
            return self._rounded
        # Made while answers are generated, it may be trained with afterwards; and autocast would round A B.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            weight = self.frozen()
            wanted, held = (weight.shape, dtype, weight.device), self._rounded
            if (held.shape, held.dtype, held.device) != wanted:
                self._rounded = torch.empty(weight.shape, dtype=dtype, device=weight.device)
            count = max(1, CHUNK // weight.shape[1])
            for out, w, own in zip(*(t.split(count) for t in (self._rounded, weight, b))):
                merged = torch.addmm(w.float(), own.float(), a.float(), alpha=scaling)
                out.copy_(GRIDS[self.grids[name]](merged))
            self._how, self._made_of = how, (b.clone(), a.clone())
        return self._rounded

    def frozen(self) -> torch.Tensor:
        """W (out, in); on a CPU 4-bit layers have it in memory already, see qlora/fast.py."""
        base = self.get_base_layer()
        dense = getattr(base, "dequantized", None)
        return dequantized(base).detach() if dense is None else dense


def register(config: LoraConfig, kind: str | None) -> LoraConfig:
    """Let PEFT make GridLinear layers, of quantized bases as well; unchanged where `kind` is None."""
    if kind is not None:
        config._register_custom_module({torch.nn.Linear: GridLinear})
    return config


def use_grid(model, adapter: str, kind: str | None) -> None:
    """Compute with this adapter through the grid `kind`, or through none; UsageError where blocks do not fit.

    The model's layers come from a config that went through register().
    """
    for name, layer in grid_layers(model):
        layer.grids.pop(adapter, None)
        if kind is not None and adapter in layer.lora_A:
            width = f"{name} is {layer.in_features} wide, not a multiple of {BLOCK}"
            require(kind == "fp8" or layer.in_features % BLOCK == 0, f"--qat {kind}: {width}; use fp8")
            layer.grids[adapter] = kind
    others = [name for name, m in model.named_modules() if adapter in getattr(m, "lora_A", ())]
    others = [name for name in others if not isinstance(model.get_submodule(name), GridLinear)]
    if kind is not None and others:
        raise UsageError(f"--qat {kind}: {others[0]} was made without it; load this adapter first")


def grid_layers(model) -> list[tuple[str, GridLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, GridLinear)]


def grid_of(model, adapter: str) -> str | None:
    """The grid that an adapter's layers compute through."""
    return next((layer.grids[adapter] for _, layer in grid_layers(model) if adapter in layer.grids), None)


@contextlib.contextmanager
def without_grid(model) -> Iterator[None]:
    """While this is open, W + s B A is not rounded."""
    layers = [layer for _, layer in grid_layers(model)]
    kept = [layer.grids for layer in layers]
    try:
        for layer in layers:
            layer.grids = {}
        yield
    finally:
        for layer, grids in zip(layers, kept):
            layer.grids = grids
