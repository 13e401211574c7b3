"""How a CPU computes matrix products, chosen by a trial: what a processor's flags promise is not its speed.

A lane says in what numbers frozen weights are multiplied. fp32 is torch's own product, and the default. bf16
is torch's as well: several times faster where the processor has AMX, slower than fp32 on others that name
bf16 among their flags. fp16 is half_products.cpp, for processors that calculate in fp16.
"""

import functools
import time
from collections.abc import Callable

import torch

from qlora.cpu import kernels
from qlora.cpu.products import Group, HalfGroup, Pool

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LANES = (*DTYPES, "fp16")
DEFAULT, MARGIN = "fp32", 1.15  # another lane has to be this much faster: trials differ by a few percent
OPERATIONS = 3e8  # of a product in the trial: some milliseconds
HOPELESS = 3.0  # times as slow as the best so far: not tried again


@functools.cache
@torch.no_grad()
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
    """What a training step does with one matrix, by each lane that is to be had here."""
    layer, found = torch.nn.Linear(width, out, bias=False), {}
    x, dy = torch.randn(tokens, width), torch.randn(tokens, out)
    for lane in LANES if kernels.load_half()[0] else DTYPES:
        group, pool = group_of([layer], lane, 0), Pool()
        d = group.gradient_buffer(pool, "d", tokens).copy_(dy)

        def run(group=group, pool=pool, d=d):
            _, low = group.up(x, pool, "y", "low")
            group.down(d, x, low, pool, "dx")

        found[lane] = run
    return found


def group_of(layers: list[torch.nn.Linear], lane: str, rank: int) -> Group:
    """Linear layers with one input, and room for LoRA of this rank altogether."""
    kind = HalfGroup if lane == "fp16" else Group
    return kind(layers, DTYPES.get(lane, torch.float32), rank)


def choose(width: int, between: int) -> tuple[str, str]:
    """(lane, the rates in words) for a model with these widths of hidden states and of the MLP."""
    found = trial(width, between)
    fastest = max(found, key=found.__getitem__)
    lane = fastest if found[fastest] > MARGIN * found[DEFAULT] else DEFAULT
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in found.items())
    return lane, f"{rates} GFLOP/s in a trial"
