"""A model's weights as they are held: which layers, how many bytes, what values they stand for."""

from __future__ import annotations

from typing import Iterator

import bitsandbytes as bnb
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def linear_layers(model) -> list[tuple[str, torch.nn.Linear]]:
    """(name, layer) of the linear layers but the head, which no precision quantizes."""
    head = model.get_output_embeddings()
    return [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]


def held_bytes(modules) -> int:
    """Bytes in memory of the modules' own tensors, quantization state included; what is tied counts once.

    transformers' get_memory_footprint() leaves out bitsandbytes' constants, and takes torchao's tensors for the 16 bits that they stand for.
    """
    things = [t for m in modules for t in (*m.parameters(False), *m.buffers(False), getattr(getattr(m, "state", None), "SCB", None))]
    return sum({t.data_ptr(): t.nbytes for thing in things for t in plain_tensors(thing)}.values())


def plain_tensors(thing) -> Iterator[torch.Tensor]:
    """The tensors inside a weight or a quantization state: codes, block constants, their constants, scales, zero points."""
    if is_traceable_wrapper_subclass(thing):  # torchao
        for name in thing.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(thing, name))
    elif isinstance(thing, torch.Tensor):
        yield thing
        for state in (getattr(thing, "quant_state", None), getattr(thing, "SCB", None)):
            yield from plain_tensors(state)
    elif isinstance(thing, bnb.functional.QuantState):
        for value in vars(thing).values():
            yield from plain_tensors(value)


def dequantized(layer: torch.nn.Linear) -> torch.Tensor:
    """The weight that a linear layer multiplies with, (out, in)."""
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(layer, bnb.nn.Linear8bitLt):  # the first forward pass moves the rows' scales from the weight to the layer
        return bnb.functional.int8_vectorwise_dequant(weight.data, layer.state.SCB if weight.SCB is None else weight.SCB)
    if type(weight).__name__.startswith("Int4"):  # torchao packs these for one kernel, which can only multiply: W = (1 W')'
        identity = torch.eye(layer.in_features, dtype=weight.dtype, device=weight.device)
        return torch.nn.functional.linear(identity, weight).T
    return weight.dequantize(torch.float32) if is_traceable_wrapper_subclass(weight) else weight
