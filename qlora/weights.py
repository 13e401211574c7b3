"""A model's weights as they are held: which layers, how many bytes, what values they stand for."""

from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qlora.packed import PackedLinear


def linear_layers(model) -> list[tuple[str, torch.nn.Linear]]:
    """(name, layer) of the linear layers but the head, which no precision quantizes."""
    head, linear = model.get_output_embeddings(), torch.nn.Linear
    return [(name, m) for name, m in model.named_modules() if isinstance(m, linear) and m is not head]


def is_coded(layer: torch.nn.Linear) -> bool:
    """Whether its weight is held in few bits and made at each use."""
    return isinstance(layer, PackedLinear) or getattr(layer.weight, "quant_state", None) is not None


def trainable_and_all(model) -> tuple[int, int]:
    """Parameters of a PEFT model by its own count, which does not see GPTQ's and AWQ's codes."""
    trainable, total = model.get_nb_trainable_parameters()
    coded = [m for m in model.modules() if isinstance(m, PackedLinear)]
    return trainable, total + sum(m.in_features * m.out_features for m in coded)


def held_bytes(modules) -> int:
    """Bytes in memory of the modules' own tensors, quantization state included; what is tied counts once.

    transformers' get_memory_footprint() leaves out bitsandbytes' constants, and takes torchao's tensors for
    the 16 bits that they stand for.
    """
    held: dict[int, int] = {}
    for m in modules:
        scales = getattr(getattr(m, "state", None), "SCB", None)
        for thing in (*m.parameters(False), *m.buffers(False), scales):
            held |= {t.data_ptr(): t.nbytes for t in plain_tensors(thing)}
    return sum(held.values())


def plain_tensors(thing) -> Iterator[torch.Tensor]:
    """The tensors inside a weight or quantization state: codes, block constants and theirs, scales, zeros."""
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
    """The weight that a linear layer multiplies with, (out, in).

    PEFT's dequantize_module_weight reassigns int8 weights on a CPU; this changes nothing.
    """
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(weight.data, *constants(layer, weight))
    if type(weight).__name__.startswith("Int4"):  # torchao packs it for a kernel that only multiplies
        identity = torch.eye(layer.in_features, dtype=weight.dtype, device=weight.device)
        return torch.nn.functional.linear(identity, weight).T
    return weight.dequantize(torch.float32) if is_traceable_wrapper_subclass(weight) else weight


def constants(module, tensor) -> list[torch.Tensor]:
    """What turns a quantized weight's codes back into numbers: scales of blocks or rows, tables of levels."""
    state = getattr(tensor, "quant_state", None)
    if hasattr(tensor, "SCB"):
        # LLM.int8: the first forward pass moves the scales from the weight to the layer.
        state = module.state.SCB if tensor.SCB is None else tensor.SCB
    return list(plain_tensors(state))
