"""Exercises of lesson 3: LoRA without PEFT. Fill in the bodies.

pytest docs/exercises -k lesson3
"""

from __future__ import annotations

import torch


class LoRALinear(torch.nn.Module):
    """3.1: a frozen linear layer with LoRA beside it: y = W x + s B A x with s = alpha / r.

    `base` is a torch.nn.Linear whose weight W has the shape (out, in). Keep it as `self.base`, and let no
    training change its weight (nor its bias, if it has one). Make two parameters of the dtype of W:
    `self.A` of shape (r, in) and `self.B` of shape (out, r). One of them begins at zero, the other is filled
    by torch.nn.init.kaiming_uniform_(matrix, a=5**0.5), as PEFT does: which is which?

    forward: x of shape (..., in) -> (..., out).

    Example: LoRALinear(torch.nn.Linear(576, 192), r=16, alpha=32) has an A of (16, 576), a B of (192, 16) and
    the scale 2. Before training it gives what its base gives, bit for bit.
    """

    def __init__(self, base: torch.nn.Linear, r: int, alpha: float):
        super().__init__()
        raise NotImplementedError("exercise 3.1")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("exercise 3.1")


def add_lora(model: torch.nn.Module, names: list[str], r: int, alpha: float) -> int:
    """3.2: put LoRALinear into a model, in place, and freeze all the rest.

    Every torch.nn.Linear whose last name is one of `names` is replaced: with ["q_proj"] the layer
    model.layers.0.self_attn.q_proj is, wherever it stands. Everything else no longer needs a gradient.
    Raises ValueError if one of `names` fits no layer, and names it; then the model is as it was.
    Returns how many parameters are left to train.

    Useful: dict(model.named_modules()), model.get_submodule(path), setattr(parent, last_name, new).
    Example: on the bundled model with ["q_proj", "v_proj"], r 16: 921,600.
    """
    raise NotImplementedError("exercise 3.2")


# A target's (inputs, outputs), by the names that a model's config has for its widths:
#   q_proj             hidden_size, num_attention_heads * head_dim
#   k_proj, v_proj     hidden_size, num_key_value_heads * head_dim
#   o_proj             num_attention_heads * head_dim, hidden_size
#   gate_proj, up_proj hidden_size, intermediate_size
#   down_proj          intermediate_size, hidden_size
def lora_parameters(config, names: list[str], r: int) -> int:
    """3.3: how many parameters LoRA of rank r adds to the modules in `names`, in all layers.

    `config` has hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim and
    num_hidden_layers. Each of the num_hidden_layers layers has one of each target. No weights are needed.

    Example: Llama 3.2 3B, ["q_proj", "v_proj"], r 16 -> 4,587,520
    """
    raise NotImplementedError("exercise 3.3")


def largest_rank(config, names: list[str], megabytes: float) -> int:
    """3.3: the largest rank whose adapter file has at most so many megabytes; 0 if not even rank 1 does.

    The file holds A and B in fp32, and next to nothing else. A megabyte is 1,000,000 bytes. Any whole number
    is a rank.
    """
    raise NotImplementedError("exercise 3.3")
