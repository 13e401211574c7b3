"""What 4-bit blocks cost beyond 4 bits: their scales, and where NF4 puts its 16 levels."""

from pathlib import Path
from statistics import NormalDist

import bitsandbytes.functional as F
from torch import Tensor

from qlora.lab import formats
from qlora.lab.formats import BLOCK, CODEBOOKS, GROUP, OUTERMOST, to_blocks
from qlora.measures import relative_error
from qlora.pictures import COLOURS, new_axes, save
from qlora.tables import table

BLOCK_SIZES = (32, 64, 128, 256, 1024)


def held_bytes(packed: Tensor, state) -> dict[str, int]:
    """Bytes of each tensor that bitsandbytes keeps for one 4-bit weight: packed codes and QuantState."""

    def size(*tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    second = state.state2
    return {
        "packed codes": size(packed),
        "scales": size(state.absmax),
        "scales of the scales": size(second and second.absmax),
        "mean of the scales": size(state.offset),
        "tables of levels": size(state.code, second and second.code),
    }


def bits_by_formula(block: int = BLOCK, double: bool = False) -> float:
    """Bits per parameter: 4 + 32/64 = 4.5; with double quantization 4 + 8/64 + 32/(64 x 256) = 4.127"""
    return 4 + (8 / block + 32 / (block * GROUP) if double else 32 / block)


def show_bits(weight: Tensor, rows: Tensor, name: str) -> dict:
    """What the scales cost: by arithmetic, in bytes that bitsandbytes holds, and with other block sizes."""
    ways = {"one_scale": False, "double": True}
    headers = ["", "one scale per block", "double quantization"]
    held, bits, sizes = {}, {}, {str(size): {} for size in BLOCK_SIZES}
    for way, double in ways.items():
        held[way] = held_bytes(*F.quantize_4bit(weight, quant_type="nf4", compress_statistics=double))
        bits[way] = 8 * sum(held[way].values()) / weight.numel()
        for size in BLOCK_SIZES:
            sizes[str(size)][way] = block_size_error(rows, size, double)
    cells = [(part, *(f"{held[way][part]:,}" for way in ways)) for part in held["double"]]
    cells.append(("sum", *(f"{sum(held[way].values()):,}" for way in ways)))
    cells.append(("bits per parameter", *(f"{bits[way]:.3f}" for way in ways)))
    cells.append(("by the formula", *(f"{bits_by_formula(double=double):.3f}" for double in ways.values())))
    print(f"\nbytes held by bitsandbytes for {name}, {weight.numel():,} weights")
    print(table(headers, cells))
    print(
        f"  formulas: 4 + 32/{BLOCK}, and 4 + 8/{BLOCK} + 32/({BLOCK} x {GROUP}): scales of 8 bits, an fp32\n"
        f"  scale per {GROUP} of them. Beyond: tables, the mean, a last group that is not full.\n"
        f"other block sizes: relative error of nf4 on {len(rows):,} rows, at bits by the formula"
    )
    cells = [
        (size, *(f"{row[way]:.3%} at {bits_by_formula(int(size), ways[way]):.3f}" for way in ways))
        for size, row in sizes.items()
    ]
    print(table(headers, cells))
    return {"bytes": held, "bits_per_parameter": bits, "block_sizes": sizes}


def block_size_error(rows: Tensor, size: int, double: bool) -> float:
    """Relative error of nf4 in blocks of `size`, with fp32 scales or with bitsandbytes' 8-bit ones.

    The 4-bit step is formats.py's: on a CPU, bitsandbytes 0.50.2 reads back wrong values where rows are not
    whole blocks.
    """
    blocks, levels = to_blocks(rows, size), CODEBOOKS["nf4"]
    codes, scales = formats.encode_levels(blocks, levels)
    if double:
        mean = scales.mean()
        scales = F.dequantize_blockwise(*F.quantize_blockwise(scales - mean, blocksize=GROUP)) + mean
    return relative_error(blocks, formats.decode_levels(codes, levels, scales))


def show_levels(gaussian: Tensor) -> dict:
    """NF4's levels, the normal distribution below each, and how often Gaussian blocks (blocks, 64) use it."""
    levels, outermost = CODEBOOKS["nf4"], NormalDist().inv_cdf(OUTERMOST)
    difference = (levels - F.get_4bit_type("nf4", device="cpu")).abs().max().item()
    below = [NormalDist().cdf(level * outermost) for level in levels.tolist()]
    used = formats.round_trip(gaussian, "nf4")[0].flatten().bincount(minlength=16) / gaussian.numel()
    entropy = -(used * used.log2()).sum().item()
    furthest = gaussian.abs().amax(1).mean().item()
    print("\nnf4's levels are normal quantiles: even steps of probability below zero, and above it")
    print(f"(level 1 is at {outermost:.3f} standard deviations)")
    rows = [
        ("level", *(f"{level:.3f}" for level in levels)),
        ("P(z < level)", *(f"{p:.3f}" for p in below)),
        ("codes used, %", *(f"{100 * share:.1f}" for share in used)),
    ]
    print(table(["code", *range(16)], rows))
    print(
        f"  Difference from bitsandbytes' table: at most {difference:.2g}. Gaussian blocks use the\n"
        f"  codes unevenly ({entropy:.2f} bits of information in 4): their largest value, scaled to 1,\n"
        f"  is on average at {furthest:.2f} standard deviations, not at {outermost:.2f}."
    )
    return {
        "levels": levels.tolist(),
        "probability_below": below,
        "used": used.tolist(),
        "entropy_bits": entropy,
        "largest_difference": difference,
    }


def draw_levels(path: Path, weight: Tensor, name: str) -> None:
    """Histogram of a layer's weights over their block's largest value, and the levels of 4-bit types."""
    blocks = to_blocks(weight).cpu()
    scaled = (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)).flatten().numpy()
    figure, (top, bottom) = new_axes(nrows=2, sharex=True, height_ratios=(3, 1.3))
    top.hist(scaled, bins=100, range=(-1, 1), weights=[100 / len(scaled)] * len(scaled), color=COLOURS[5])
    title = f"{name}: {weight.shape[0]} x {weight.shape[1]} weights in blocks of {BLOCK}"
    top.set(ylabel="% of weights", title=title)
    for level in CODEBOOKS["nf4"].tolist():
        top.axvline(level, color=COLOURS[0], linewidth=0.6, linestyle=":")
    marks = {"nf4": ("|", 14, COLOURS[0]), "fp4": ("^", 7, COLOURS[3]), "int4": ("o", 7, COLOURS[6])}
    for row, (kind, (marker, size, colour)) in enumerate(marks.items()):
        levels, edge = CODEBOOKS[kind].unique(), 2 if marker == "|" else 1
        bottom.plot(levels, [-row] * len(levels), marker, color=colour, markersize=size, markeredgewidth=edge)
    bottom.set(yticks=(0, -1, -2), yticklabels=("NF4", "FP4", "int4, uniform"))
    bottom.set(
        ylim=(-2.6, 0.6),
        xlim=(-1.03, 1.03),
        xlabel="weight / largest absolute value of its block (dotted: NF4's levels)",
    )
    save(figure, path)
