"""Solutions of lesson 3."""

from __future__ import annotations

import torch


class LoRALinear(torch.nn.Module):
    def __init__(self, base: torch.nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        out, inner = base.weight.shape
        self.A = torch.nn.Parameter(torch.empty(r, inner, dtype=base.weight.dtype))
        # B is zero, so B A is: training begins with the base exactly. A must not be zero as well: the
        # gradient of B is made of A x, that of A of B. With two zeros both are zero for ever.
        self.B = torch.nn.Parameter(torch.zeros(out, r, dtype=base.weight.dtype))
        torch.nn.init.kaiming_uniform_(self.A, a=5**0.5)
        self.scale = alpha / r  # not alpha: the rank may change and the strength stays

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # First A, then B: two thin products. B A itself, as large as W, is never made.
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)


def add_lora(model: torch.nn.Module, names: list[str], r: int, alpha: float) -> int:
    # A list, because the model must not change while one walks through it.
    linear = [(path, m) for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    found = {path: m for path, m in linear if path.rpartition(".")[2] in names}
    missing = set(names) - {path.rpartition(".")[2] for path in found}
    if missing:  # before anything is changed: an adapter with a part missing trains, and nobody notices
        raise ValueError(f"no linear layer is called {', '.join(sorted(missing))}")
    model.requires_grad_(False)
    for path, layer in found.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, LoRALinear(layer, r, alpha))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def lora_parameters(config, names: list[str], r: int) -> int:
    hidden, wide = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim  # need not be hidden_size: Qwen3's is not
    keys = config.num_key_value_heads * config.head_dim  # smaller, where queries share keys
    shapes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, wide),
        "up_proj": (hidden, wide),
        "down_proj": (wide, hidden),
    }
    # A has r x in numbers, B out x r: a sum, where W has a product.
    return config.num_hidden_layers * sum(r * sum(shapes[name]) for name in names)


def largest_rank(config, names: list[str], megabytes: float) -> int:
    # The size is proportional to the rank, and a rank need not be a power of two.
    return int(megabytes * 1e6 // (4 * lora_parameters(config, names, 1)))
