"""What is changed in a loaded model's forward; parameters and state dict stay the libraries' own.

Logits at labelled positions only, on every device. On a CPU the decoder of qlora/cpu, where the model is one
that it knows. On a GPU without FlashAttention keys are repeated, for the next best kernel.
"""

import contextlib
import functools
import types

import psutil
import torch
import torch.nn.functional as F

from qlora.cpu.attach import MEMORY_SHARE, attach, unusual_adapter
from qlora.logits import causal_lm, loss_at_labels
from qlora.processes import is_sharded
from qlora.weights import dequantized, is_coded, linear_layers


def make_fast(model, lane: str = "fp32") -> str:
    """Change the forward of a model whose adapters are in; returns what was done, in words.

    `lane`: how a CPU computes products (qlora/cpu/lanes.py).
    """
    lm = causal_lm(model)
    loss_at_labels(lm)
    if lm.device.type == "cuda" and not has_flash(torch.cuda.get_device_capability(lm.device), lm.dtype):
        return repeat_keys(lm)
    if lm.device.type != "cpu":
        return "the libraries' own"
    if is_sharded():
        return "the libraries' own: the base is sharded"
    return use_cpu(model, lm, lane)


def use_cpu(model, lm, lane: str) -> str:
    """Let a model on a CPU compute by this lane, or as the libraries do where it can't; which and why."""
    decoder, words = attach(model, lm, lane)
    if decoder is None:
        dense_once(lm)
        return f"the libraries' own: {words}"
    shared = [pair for layer in decoder.layers for pair in layer.dense() if pair[0].dtype == lm.dtype]
    for weight, module in shared:
        use_dense(module, weight)
    if not shared and not any(p.requires_grad for p in model.parameters()):
        dense_once(lm)  # to generate with, token by token
    return f"{lane} products, own decoder, {words}"


def dense_once(lm) -> None:
    """Dequantize the frozen values of a quantized model once, if memory allows it; a CPU is slow at that."""
    quantized = [m for _, m in linear_layers(lm) if is_coded(m)]
    size = sum(m.out_features * m.in_features for m in quantized) * lm.dtype.itemsize
    if size < MEMORY_SHARE * psutil.virtual_memory().available:
        for module in quantized:
            use_dense(module, dequantized(module).to(lm.dtype))


def use_dense(module, weight) -> None:
    """Let a linear layer multiply with these values (out, in) of its own; packed ones stay, for saving."""
    if is_coded(module):
        module.dequantized = weight
        module.forward = types.MethodType(_dense_forward, module)
    elif type(module) is torch.nn.Linear:
        module.weight.data = weight  # one copy is enough


def _dense_forward(self, x):
    return F.linear(x.to(self.dequantized.dtype), self.dequantized, self.bias).to(x.dtype)


@contextlib.contextmanager
def one_product(model):
    """On a CPU, while this is open: W + s B A made once, so that a layer is one product instead of three.

    For generating token by token, where each product costs a pass over memory or a call. Only in fp32, in
    which W + s B A is what the parts give (bf16 would round a young adapter away), in evaluation mode, for
    plain LoRA that is switched on, and where the copy fits into memory.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    layers = mergeable(model) if on_cpu and not model.training and not is_sharded() else []
    size = sum(base_values(layer).nbytes for layer in layers)
    if size >= MEMORY_SHARE * psutil.virtual_memory().available:
        layers = []
    for layer in layers:
        with torch.no_grad():
            weight = base_values(layer) + layer.get_delta_weight(layer.active_adapters[0]).float()
        layer.forward = functools.partial(F.linear, weight=weight, bias=layer.get_base_layer().bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def mergeable(model) -> list:
    """PEFT's layers that one_product() can take; none of them unless it can take all that are switched on."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and not m.disable_adapters]
    plain = all(
        len(m.active_adapters) == 1
        and not m.merged
        and not unusual_adapter(m)
        and base_values(m).dtype == torch.float32
        for m in layers
    )
    return [m for m in layers if m.active_adapters[0] in m.lora_A] if plain else []


def base_values(layer) -> torch.Tensor:
    """The frozen values (out, in) that a PEFT layer's base multiplies with."""
    base = layer.get_base_layer()
    return base.dequantized if hasattr(base, "dequantized") else base.weight


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
