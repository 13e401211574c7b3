"""How a CPU computes matrix products, chosen by a trial: what a processor's flags promise is not its speed.

A lane says in what numbers frozen weights are multiplied. fp32 is torch's own product, and the default. bf16
is torch's as well: several times faster where the processor has AMX, slower than fp32 on others that name
bf16 among their flags. fp16 is half_products.cpp, for processors that calculate in fp16.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from qlora.cpu import kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LANES = (*DTYPES, "fp16")
DEFAULT, MARGIN = "fp32", 1.15  # another lane has to be this much faster: trials differ by a few percent
OPERATIONS = 3e8  # of a product in the trial: some milliseconds
HOPELESS = 3.0  # times as slow as the best so far: not tried again


@functools.cache
def trial(width: int, between: int) -> dict[str, float]:
    """GFLOP/s of each lane for a layer's gate and up products, forward and backward."""
    out, found = 2 * between, {}
    tokens = max(16, int(OPERATIONS / (2 * width * out)) // 16 * 16)
    for lane, run in candidates(tokens, width, out).items():
        best = float("inf")
        for attempt in range(5):
            started = time.perf_counter()
            run()
            took = time.perf_counter() - started
            best = min(best, took) if attempt else best  # the first one makes the kernels
            rate = 4 * tokens * width * out / took / 1e9
            if attempt and rate * HOPELESS < max(found.values(), default=0.0):
                break
        found[lane] = 4 * tokens * width * out / best / 1e9
    return found


def candidates(tokens: int, width: int, out: int) -> dict[str, Callable]:
    """The products of each lane that is to be had here: y = x W^T and dx = dy W."""
    x, weight, dy = (torch.randn(s) for s in ((tokens, width), (out, width), (tokens, out)))

    def torchs(dtype):
        a, b, c = (t.to(dtype) for t in (x, weight, dy))
        return lambda: (a @ b.t(), c @ b)

    found: dict[str, Callable] = {lane: torchs(dtype) for lane, dtype in DTYPES.items()}
    if half := half_products(weight):
        found["fp16"] = lambda: half(x, dy)
    return found


def half_products(weight) -> Callable | None:
    """(x, dy) -> x W^T and dy W by half_products.cpp; None where it is not to be had."""
    operators, _ = kernels.load_half()
    if operators is None:
        return None
    largest, packed = weight.abs().max().item(), []
    for each in (weight, weight.t()):
        packed.append(torch.empty(kernels.packed_size(*each.shape), dtype=torch.float16))
        operators.half_pack(each, largest, packed[-1])

    def products(x, dy):
        both = torch.empty(len(x), len(weight)), torch.empty_like(x)
        operators.half_product(x, packed[0], largest, both[0])
        operators.half_product(dy, packed[1], largest, both[1])
        return both

    return products


def choose(width: int, between: int) -> tuple[str, str]:
    """(lane, the rates in words) for a model with these widths of hidden states and of the MLP."""
    found = trial(width, between)
    fastest = max(found, key=found.__getitem__)
    lane = fastest if found[fastest] > MARGIN * found[DEFAULT] else DEFAULT
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in found.items())
    return lane, f"{rates} GFLOP/s in a trial"
