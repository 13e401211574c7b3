"""Faster training on a CPU, on PEFT's own layers: less copying, the same mathematics.

PEFT's forward of a LoRA layer casts its input to fp32 and back and keeps both copies; bitsandbytes
dequantizes each 4-bit matrix twice a step; torch's CPU flash attention is slow in the backward pass at a few
hundred tokens. Here the frozen values are dequantized once (2 bytes a parameter: fit for a CPU's memory, not
for a GPU's), LoRA's products are one autograd function that keeps only its input, short attention is three
batched products, and norms and gates keep no fp32 copies. benchmarks/training_speed.py measures each against
the plain stack.
"""

import types

import torch
import torch.nn.functional as F

from qlora.logits import causal_lm, loss_at_labels
from qlora.processes import is_sharded
from qlora.weights import dequantized

# Longest row whose attention matrix is made in full: it grows as the square, and the blocked kernel wins.
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
    """softmax(q k^T s + causal) v, softmax in fp32; q (batch, heads, L, d), k and v (batch, groups, L, d).

    The heads of a group share k and v: they are stacked along L, so nothing is repeated in memory.
    """

    @staticmethod
    def forward(ctx, q, k, v, bias, scale):
        batch, heads, length, d = q.shape
        groups = k.shape[1]
        q, k, v = (x.reshape(batch * groups, -1, d) for x in (q, k, v))
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
    """w x / rms(x), keeping x (the residual keeps it anyway) and one number a token, no fp32 copies of x."""

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
        one_head = torch.full((length, length), float("-inf"), dtype=dtype).triu_(1)
        _bias[key] = one_head.repeat(heads_per_group, 1)[None]
    return _bias[key]


def attention(module, q, k, v, attention_mask, dropout=0.0, scaling=None, is_causal=None, **kwargs):
    """transformers' attention interface: full causal rows here, all else (masks, caches) by its own SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    length = q.shape[2]
    whole_rows = attention_mask is None and 1 < length == k.shape[2] <= LONGEST_FULL_ATTENTION
    special = dropout or is_causal is False or kwargs.get("softcap") or kwargs.get("sliding_window")
    if special or not whole_rows or q.dtype != torch.bfloat16:
        kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, q, k, v, attention_mask, **kwargs)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return CausalAttention.apply(q, k, v, causal_bias(q.shape[1] // k.shape[1], length, q.dtype), scale), None


def has_flash(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether torch has FlashAttention for a GPU of this compute capability and in this dtype."""
    return capability >= (8, 0) and dtype in (torch.float16, torch.bfloat16)


def repeated_keys_attention(module, q, k, v, attention_mask, is_causal=None, **kwargs):
    """transformers' SDPA for GPUs without FlashAttention (a T4, or any in fp32), where heads share keys.

    There transformers asks for grouped heads (enable_gqa), which of the kernels left only the plain one
    takes: it makes the whole attention matrix and keeps it (transformers issue 48633).
    With each head's keys in its place torch takes its memory-efficient kernel. For a single token the heads
    of a group become the rows of one head instead, so that a long cache is not repeated.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    alone = types.SimpleNamespace(is_causal=is_causal)  # says nothing of groups
    heads, groups = q.shape[1], k.shape[1]
    if q.shape[2] == 1 and attention_mask is None:
        packed = q.reshape(q.shape[0], groups, heads // groups, q.shape[3])
        out = sdpa_attention_forward(alone, packed, k, v, None, is_causal=False, **kwargs)[0]
        # (batch, heads of a group, groups, d): back to one token with all heads
        return out.transpose(1, 2).reshape(q.shape[0], 1, heads, -1), None
    if heads != groups:
        k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    return sdpa_attention_forward(alone, q, k, v, attention_mask, is_causal=is_causal, **kwargs)


def make_fast(model) -> str:
    """Everything that this repository changes in a loaded model's forward; returns what was done, in words.

    Logits at labelled positions only, on every device. On a GPU without FlashAttention: keys repeated, for
    the next best kernel. On a CPU in bf16: frozen values dequantized once, full short attention, norms and
    gates without fp32 copies, fused LoRA. Call it when the adapters are in.
    Parameters, state dict and merging stay the libraries' own.
    """
    lm = causal_lm(model)
    loss_at_labels(lm)
    if lm.device.type == "cuda" and not has_flash(torch.cuda.get_device_capability(lm.device), lm.dtype):
        return repeat_keys(lm)
    if lm.device.type != "cpu" or lm.dtype != torch.bfloat16 or is_sharded():
        return "the libraries' own"
    matrices, size = speed_up_base(lm)
    speed_up_lora(model)
    once = f"{matrices} 4-bit matrices dequantized once ({size / 1e6:.0f} MB more), " if matrices else ""
    return f"for the CPU: {once}short attention in full, LoRA fused"


def repeat_keys(lm) -> str:
    """Attend by repeated_keys_attention(); what was done, in words."""
    if lm.config._attn_implementation != "sdpa":
        return "the libraries' own"
    use_attention(lm, "repeated_keys", repeated_keys_attention)
    return "keys repeated for torch's memory-efficient attention: FlashAttention has no kernel for this GPU"


def use_attention(lm, name: str, attention) -> None:
    """Let `lm` attend by this function, with the masks of SDPA."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    lm.set_attn_implementation(name)


def speed_up_base(lm) -> tuple[int, int]:
    """Dequantize the frozen values of a 4-bit model once, use the attention above; (matrices, their bytes).

    The 4-bit weights stay in place, for saving, hashing and merging.
    """
    dense = []
    for module in lm.modules():
        kind = type(module).__name__
        if kind in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm"):
            module.forward = types.MethodType(_norm_forward, module)
        elif kind in ("LlamaMLP", "MistralMLP", "Qwen2MLP") and lm.config.hidden_act == "silu":
            module.forward = types.MethodType(_mlp_forward, module)
        elif isinstance(module, torch.nn.Linear) and getattr(module.weight, "quant_state", None) is not None:
            module.dequantized = dequantized(module).to(torch.bfloat16)
            module.forward = types.MethodType(_dense_forward, module)
            dense.append(module.dequantized)
    if lm.config._attn_implementation == "sdpa":
        use_attention(lm, "causal_products", attention)
    return len(dense), sum(m.nbytes for m in dense)


def speed_up_lora(model) -> None:
    """Give a PEFT model's LoRA layers the fused function.

    A layer with dropout, DoRA, a merged or more than one active adapter keeps PEFT's own forward.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), torch.nn.Linear):
            layer.forward = types.MethodType(_lora_forward, layer)


def _norm_forward(self, x):
    return RMSNorm.apply(x, self.weight, self.variance_epsilon)


def _mlp_forward(self, x):
    return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def _dense_forward(self, x):
    return F.linear(x, self.dequantized.to(x.dtype), self.bias)


def _lora_forward(self, x, *args, **kwargs):
    adapters = self.active_adapters
    name = adapters[0] if len(adapters) == 1 else None
    frozen = getattr(self.get_base_layer(), "dequantized", self.get_base_layer().weight)
    simple = (
        name in self.lora_A
        and not (args or kwargs or self.disable_adapters or self.merged)
        and name not in self.lora_variant
        and x.dtype == frozen.dtype == torch.bfloat16
        and not (self.training and getattr(self.lora_dropout[name], "p", 0.0))
    )
    if not simple:
        return type(self).forward(self, x, *args, **kwargs)
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    flat = x.reshape(-1, x.shape[-1])
    y = LoraLinear.apply(flat, frozen, self.get_base_layer().bias, a, b, self.scaling[name])
    return y.view(*x.shape[:-1], y.shape[-1])
