"""Plausible wrong answers to lesson 3; tests/docs/test_exercises.py says how they are named."""

from __future__ import annotations

import torch

WIDTHS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Lora(torch.nn.Module):
    """A right LoRALinear, whose parts the wrong ones replace."""

    freeze, zero = True, "B"

    def __init__(self, base, r, alpha):
        super().__init__()
        self.base = base.requires_grad_(not self.freeze)
        out, inner = base.weight.shape
        self.A, self.B = (torch.nn.Parameter(torch.zeros(shape)) for shape in ((r, inner), (out, r)))
        for name in {"A", "B"} - set(self.zero):
            torch.nn.init.kaiming_uniform_(getattr(self, name), a=5**0.5)
        self.scale = self.strength(r, alpha)

    def strength(self, r, alpha):
        return alpha / r

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


class e1_LoRALinear__alpha_not_divided(Lora):
    def strength(self, r, alpha):
        return alpha


class e1_LoRALinear__no_alpha(Lora):
    def strength(self, r, alpha):
        return 1.0


class e1_LoRALinear__scaled_as_rslora(Lora):
    def strength(self, r, alpha):
        return alpha / r**0.5


class e1_LoRALinear__a_begins_at_zero(Lora):
    zero = "A"


class e1_LoRALinear__both_begin_at_zero(Lora):
    zero = "AB"


class e1_LoRALinear__base_not_frozen(Lora):
    freeze = False


def put(model, names, r, alpha):
    for path, layer in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in names:
            setattr(model.get_submodule(parent), name, Lora(layer, r, alpha))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def e2_add_lora__ignores_unknown_names(model, names, r, alpha):
    model.requires_grad_(False)
    return put(model, names, r, alpha)


def e2_add_lora__rest_not_frozen(model, names, r, alpha):
    return put(model, names, r, alpha)


def e2_add_lora__one_layer_only(model, names, r, alpha):
    model.requires_grad_(False)
    return put(model.get_submodule("model.layers.0"), names, r, alpha)


def count(config, names, r, queries, keys):
    hidden, wide = config.hidden_size, config.intermediate_size
    outer = (queries, keys, keys, queries, wide, wide, wide)
    other = dict(zip(WIDTHS, outer, strict=True))
    return config.num_hidden_layers * sum(r * (hidden + other[name]) for name in names)


def e3_lora_parameters__all_square(config, names, r):
    return count(config, names, r, config.hidden_size, config.hidden_size)


def e3_lora_parameters__width_of_the_model_for_queries(config, names, r):
    keys = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return count(config, names, r, config.hidden_size, keys)


def e3_lora_parameters__product_of_in_and_out(config, names, r):
    one = config.hidden_size * config.num_attention_heads * config.head_dim
    return config.num_hidden_layers * len(names) * r * one


def e3_largest_rank__powers_of_two(config, names, megabytes):
    keys, queries = (n * config.head_dim for n in (config.num_key_value_heads, config.num_attention_heads))
    most = megabytes * 1e6 / (4 * count(config, names, 1, queries, keys))
    return max((2**n for n in range(12) if 2**n <= most), default=0)


def e3_largest_rank__sixteen_bits(config, names, megabytes):
    keys, queries = (n * config.head_dim for n in (config.num_key_value_heads, config.num_attention_heads))
    return int(megabytes * 1e6 // (2 * count(config, names, 1, queries, keys)))
