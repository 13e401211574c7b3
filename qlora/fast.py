"""Faster training on a CPU, on PEFT's own layers: less copying, the same mathematics.

PEFT's forward of a LoRA layer casts its input to fp32 and back and keeps both copies; bitsandbytes dequantizes each
4-bit matrix twice a step; torch's CPU flash attention is slow in the backward pass at a few hundred tokens.
Here the frozen values are dequantized once (2 bytes a parameter: fit for a CPU's memory, not for a GPU's), LoRA's
products are one autograd function that keeps only its input, short attention is three batched products, and norms and
gates keep no fp32 copies.
benchmarks/training_speed.py measures each against the plain stack.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F

# Longest row whose attention matrix is made in full; beyond it the blocked kernel wins and memory grows as its square.
LONGEST_FULL_ATTENTION = 768


class LoraLinear(torch.autograd.Function):
    """y = x W^T + bias + s (x A^T) B^T; x (tokens, in), frozen W (out, in), A (r, in), B (out, r)."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scaling):
        a16, b16 = a.to(x.dtype), b.to(x.dtype)  # fp32 masters, as autocast casts them
        low = (x @ a16.t()).mul_(scaling)
        ctx.save_for_backward(x, low, weight, a16, b16)
        ctx.scaling = scaling
        return F.linear(x, weight, bias).addmm_(low, b16.t())

    @staticmethod
    def backward(ctx, dy):
        x, low, weight, a, b = ctx.saved_tensors
        d_low = (dy @ b).mul_(ctx.scaling)
        dx = (dy @ weight).addmm_(d_low, a) if ctx.needs_input_grad[0] else None
        return dx, None, None, (d_low.t() @ x).float(), (low.t() @ dy).t().float(), None


class CausalAttention(torch.autograd.Function):
    """softmax(q k^T s + causal) v with softmax in fp32; q (batch, heads, L, d), k and v (batch, groups, L, d).

    The heads of a group share k and v: they are stacked along L, so nothing is repeated in memory.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, scale):
        batch, heads, length, d = q.shape
        groups = k.shape[1]
        q, k, v = q.reshape(batch * groups, -1, d), k.reshape(batch * groups, length, d), v.reshape(batch * groups, length, d)
        p = torch.softmax(torch.baddbmm(bias, q, k.mT, alpha=scale), -1, dtype=torch.float32).to(q.dtype)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.dims = scale, (batch, heads, groups, length, d)
        return torch.bmm(p, v).view(batch, heads, length, d).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, dout):
        q, k, v, p = ctx.saved_tensors
        batch, heads, groups, length, d = ctx.dims
        dout = dout.transpose(1, 2).reshape(batch * groups, -1, d)
        ds = torch._softmax_backward_data(torch.bmm(dout, v.mT), p, -1, p.dtype)
        dq = torch.bmm(ds, k).mul_(ctx.scale).view(batch, heads, length, d)
        dk = torch.bmm(ds.mT, q).mul_(ctx.scale).view(batch, groups, length, d)
        return dq, dk, torch.bmm(p.mT, dout).view(batch, groups, length, d), None, None


class RMSNorm(torch.autograd.Function):
    """w x / rms(x), keeping x (which the residual keeps anyway) and one number a token instead of fp32 copies of x."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        d = (dy * weight).float()
        along = (d * x).mean(-1, keepdim=True).mul_(scale**3)
        return d.mul_(scale).sub_(x * along).to(x.dtype), None, None


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping its two inputs; the sigmoid is made again in the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(dy)
        return torch.ops.aten.silu_backward(dy * up, gate), d_up


_bias: dict = {}


def causal_bias(heads_per_group: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """(1, heads_per_group * length, length): 0 where a token may look, -inf where it would look ahead."""
    key = (heads_per_group, length, dtype)
    if key not in _bias:
        _bias.clear()  # lengths change from batch to batch; only the layers of one batch share it
        _bias[key] = torch.full((length, length), float("-inf"), dtype=dtype).triu_(1).repeat(heads_per_group, 1)[None]
    return _bias[key]


def attention(module, q, k, v, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """transformers' attention interface: full causal rows here, everything else (masks, caches) by its own SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length = q.shape[2]
    whole_rows = attention_mask is None and 1 < length == k.shape[2] <= LONGEST_FULL_ATTENTION
    plain = not dropout and is_causal is not False and kwargs.get("softcap") is None and kwargs.get("sliding_window") is None
    if not (whole_rows and plain and q.dtype == torch.bfloat16):
        return sdpa_attention_forward(module, q, k, v, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return CausalAttention.apply(q, k, v, causal_bias(q.shape[1] // k.shape[1], length, q.dtype), scale), None


def speed_up_base(lm) -> str:
    """Dequantize the frozen values of a 4-bit model once and take the attention above; returns what was done, in words.

    Only on a CPU in bf16; the 4-bit weights stay in place, for saving, hashing and merging.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if lm.device.type != "cpu" or lm.dtype != torch.bfloat16:
        return "the libraries' own"
    for module in lm.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"):
            module.forward = types.MethodType(lambda self, x: RMSNorm.apply(x, self.weight, self.variance_epsilon), module)
        if type(module).__name__ in ("LlamaMLP", "MistralMLP", "Qwen2MLP") and lm.config.hidden_act == "silu":
            module.forward = types.MethodType(lambda self, x: self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x))), module)
    dense = [_dense(m) for m in lm.modules() if isinstance(m, torch.nn.Linear) and getattr(m.weight, "quant_state", None) is not None]
    if lm.config._attn_implementation == "sdpa":
        AttentionInterface.register("causal_products", attention)
        AttentionMaskInterface.register("causal_products", sdpa_mask)
        lm.set_attn_implementation("causal_products")
    megabytes = sum(m.numel() * m.element_size() for m in dense) / 1e6
    once = f"{len(dense)} 4-bit matrices dequantized once ({megabytes:.0f} MB more), " if dense else ""
    return f"for the CPU: {once}short attention in full, LoRA fused"


def _dense(linear) -> torch.Tensor:
    import bitsandbytes as bnb

    linear.dequantized = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(torch.bfloat16)
    linear.forward = types.MethodType(lambda self, x: F.linear(x, self.dequantized.to(x.dtype), self.bias), linear)
    return linear.dequantized


def speed_up_lora(model) -> None:
    """Give a PEFT model's LoRA layers the fused function; parameters, state dict and switching off stay PEFT's.

    A layer with dropout, DoRA, a merged or more than one active adapter takes PEFT's own forward.
    """
    from peft.tuners.lora import LoraLayer

    lm = model.get_base_model()
    if lm.device.type != "cpu" or lm.dtype != torch.bfloat16:
        return
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            layer.forward = types.MethodType(_lora_forward, layer)


def _lora_forward(self, x, *args, **kwargs):
    adapters = self.active_adapters
    name = adapters[0] if len(adapters) == 1 else None
    frozen = getattr(self.get_base_layer(), "dequantized", self.get_base_layer().weight)
    simple = (
        name in self.lora_A and not (args or kwargs) and not self.disable_adapters and not self.merged
        and name not in self.lora_variant and x.dtype == frozen.dtype == torch.bfloat16
        and not (self.training and getattr(self.lora_dropout[name], "p", 0.0))
    )
    if not simple:
        return type(self).forward(self, x, *args, **kwargs)
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    y = LoraLinear.apply(x.reshape(-1, x.shape[-1]), frozen, self.get_base_layer().bias, a, b, self.scaling[name])
    return y.view(*x.shape[:-1], y.shape[-1])
