"""What is right where the usual teaching material is wrong, one function for each claim.

A function computes or measures the truth, or reads it from a file in benchmarks/results, and returns a Truth.
Its name and first line say what is right; docs/claims.md has the claims.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

RESULTS = Path(__file__).resolve().parents[1] / "results"
HERE, DOCUMENTED = "measured here", "documentation, not measured here"


@dataclass(frozen=True)
class Truth:
    holds: bool
    text: str  # one line, with the numbers
    source: str = HERE  # or the names of the result files it was read from, or DOCUMENTED


def recorded(pattern: str) -> tuple[dict | list, str]:
    """(what the first result file of that name holds, its name); raises LookupError where there is none."""
    paths = sorted(RESULTS.glob(pattern))
    if not paths:
        raise LookupError(f"there is no benchmarks/results/{pattern}; see benchmarks/results.py --list")
    return json.loads(paths[0].read_text()), str(paths[0].relative_to(RESULTS))


def small(error: float) -> str:
    """2.7e-07 -> '3e-07', 0.0 -> '0'"""
    return f"{error:.0e}" if error else "0"


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random two-layer Llama (hidden 64, vocabulary 256) in fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids (rows, length) of tiny_llama()."""
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(seed))
