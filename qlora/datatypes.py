"""What a data type keeps of one number, of a block of 64 weights, of a layer and of a model, printed to be read.

The formats are written out in formats.py; here they meet real weights, and torch and bitsandbytes say whether they agree.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from qlora.cli import UsageError
from qlora.formats import (
    BLOCK, CODEBOOKS, FLOATS, GROUP, OUTERMOST, TYPES, decode_levels, encode_levels, one_thread, relative, round_trip, squared_errors, to_blocks,
    weight_errors,
)

import bitsandbytes.functional as F  # noqa: E402

SHOWN = ("int8", "int4", "fp4", "nf4")  # of one number and of one block, which share a scale
GAUSSIAN = (4096, BLOCK)


@one_thread()
def show_datatypes(weight: Tensor, name: str, number: float = 0.1) -> dict:
    """Print what the data types make of `number` and of a layer's 16-bit `weight` (out, in); returns the figures."""
    if not torch.tensor(number).isfinite():
        raise UsageError(f"{number} can't be shown in the data types: give a number that fp32 holds, up to {torch.finfo().max:.3g}")
    weight = weight.detach()
    rows = weight[: max(1, 2**20 // weight.shape[1])].float()  # a million weights measure as well as all, and quickly
    gaussian = torch.randn(GAUSSIAN, generator=torch.Generator().manual_seed(0))
    block = to_blocks(weight.flatten()[:BLOCK]).cpu()
    return {
        "device": weight.device.type,
        "layer": name,
        "number": show_number(number, block),
        "block": show_block(block, name),
        "errors": show_errors(rows, gaussian, name),
        "bits": show_bits(weight, rows, name),
        "levels": show_levels(gaussian),
    }


def show_number(number: float, block: Tensor) -> dict:
    """One number in every type; those that need a scale take the one that `block` would have with the number in it."""
    scale = max(block.abs().max().item(), abs(number))
    print(f"one number: {number!r}; {', '.join(SHOWN)}: in a block whose largest value is {scale:.6g} (the block below, with this number in it)")
    print(f"  {'type':10}{'bits':36}{'which means':28}{'reads back':>18}{'relative error':>16}   library")
    found = {}
    single = FLOATS[0].decode(FLOATS[0].encode(number))  # torch rounds to fp32 first
    for kind in FLOATS:
        code = kind.encode(number if kind is FLOATS[0] else single)
        sign, exponent, mantissa = kind.parts(code)
        means = f"{'-' if sign else '+'}{mantissa / 2**kind.mantissa_bits + (exponent > 0):.7g} x 2^{max(exponent - 1, 0) + kind.lowest}"
        library = torch.tensor(single).to(kind.dtype).double().item()
        found[kind.name] = number_row(kind.name, kind.spell(code), means, number, kind.decode(code), library, "torch")
    values = to_blocks(torch.tensor([number, scale]))
    for kind in SHOWN:
        codes, _, back = round_trip(values, kind)
        code = codes[0, 0].item()
        means = f"{code} x {scale:.6g} / 127" if kind == "int8" else f"level {CODEBOOKS[kind][code].item():+.4f} x {scale:.6g}"
        library = None if kind == "int4" else library_round_trip(values, kind)[0, 0].item()
        found[kind] = number_row(kind, spell_code(kind, code), means, number, back[0, 0].item(), library, "bitsandbytes")
    return {"number": number, "scale": scale, "types": found}


def number_row(kind: str, bits: str, means: str, number: float, back: float, library: float | None, whose: str) -> dict:
    finite = math.isfinite(back)
    error = abs(back - number) / abs(number) if number else abs(back)
    verdict = "-" if library is None else f"= {whose}" if back == library else f"{whose}: {library!r}"
    print(f"  {kind:10}{bits:36}{means if finite else 'too large: infinity':28}{back:>18.10g}{error:>16.2e}   {verdict}")
    # JSON has no infinity.
    return {"bits": bits, "value": back if finite else None, "relative_error": error if finite else None, "library": library if finite else None}


def spell_code(kind: str, code: int) -> str:
    """int8 and int4 are whole numbers in two's complement, fp4 begins with a sign, nf4's code is a place in its table."""
    if kind == "int8":
        return f"{code & 255:08b}"
    bits = f"{(code - 7) & 15 if kind == 'int4' else code:04b}"
    return f"{bits[0]} {bits[1:]}" if kind == "fp4" else bits


def library_round_trip(values: Tensor, kind: str) -> Tensor:
    """bitsandbytes' own values read back, of (rows, n) fp32: int8 with a scale per row, fp4 and nf4 per block of 64."""
    if kind == "int8":
        return F.int8_vectorwise_dequant(*F.int8_vectorwise_quant(values)[:2])
    return F.dequantize_4bit(*F.quantize_4bit(values, quant_type=kind, blocksize=BLOCK))


def show_block(block: Tensor, name: str) -> dict:
    """(1, 64) weights in the types that share a scale: codes and values of the first eight."""
    def line(first: str, error: str, label: str, cells) -> None:
        print(f"  {first:10}{error:>16}   {label:8}" + "".join(f"{cell:>9}" for cell in cells))

    print(f"\none block: the first {BLOCK} weights of {name}, which share one fp32 scale, their largest value {block.abs().max():.6g}")
    line("type", "relative error", "", [f"w{i}" for i in range(8)])
    line("16 bits", "", "value", [f"{w:.4f}" for w in block[0, :8]])
    found = {}
    for kind in SHOWN:
        codes, absmax, back = round_trip(block, kind)
        error = relative_error(block, back)
        line(kind, f"{100 * error:.2f}%", "code", codes[0, :8].tolist() if kind == "int8" else [spell_code(kind, c) for c in codes[0, :8].tolist()])
        line("", "", "value", [f"{value:.4f}" for value in back[0, :8]])
        found[kind] = {"scale": absmax.item(), "codes": codes[0].tolist(), "relative_error": error}
    return found


def relative_error(given: Tensor, back: Tensor) -> float:
    return ((given - back).norm() / given.norm().clamp(min=1e-38)).item()


def show_errors(rows: Tensor, gaussian: Tensor, name: str) -> dict:
    """Each type's error on Gaussian weights and on a layer, and whether bitsandbytes reads back the same there."""
    normal, layer = relative(squared_errors(gaussian)), relative(squared_errors(rows))
    print(f"\nrelative error |w - w'| / |w|; one fp32 scale per block of {BLOCK} (int8: per row)")
    print(f"  {'type':18}{'levels':>7}{'Gaussian ({} x {})'.format(*GAUSSIAN):>24}   {name} ({rows.shape[0]} x {rows.shape[1]})")
    for kind in sorted(TYPES, key=normal.get):
        levels = 255 if kind == "int8" else len(CODEBOOKS[kind].unique())
        print(f"  {kind:18}{levels:>7}{100 * normal[kind]:>23.2f}%   {100 * layer[kind]:.2f}%")
    if normal["fp4"] > normal["int4"] > normal["fp4 E2M1"]:
        smallest, standard = (1 / CODEBOOKS[kind][CODEBOOKS[kind] > 0].min().item() for kind in ("fp4", "fp4 E2M1"))
        print("  The QLoRA paper ranks NF4, FP4, Int4 (by perplexity). Here bitsandbytes' fp4 is behind int4: its smallest level, "
              f"1/{smallest:.0f} of\n  the largest, is all but a second zero. With 1/{standard:.0f}, as the MX standard has it (fp4 E2M1), "
              "it is ahead of int4 with 15 levels.")
    distinct = torch.tensor([len(group.unique()) for group in rows.reshape(-1)[: 1024 * 32].split(32)])
    origin = ": these were unpacked from 4 bits" if distinct.max() <= 16 else ""
    print(f"  32 neighbouring 16-bit weights of the layer hold {distinct.float().mean():.1f} different values, at most {distinct.max()}{origin}.")
    blocks = to_blocks(rows)
    same = {kind: torch.equal(round_trip(blocks, kind)[2], to_blocks(library_round_trip(rows, kind))) for kind in ("fp4", "nf4")}
    verdicts = ", ".join(f"{kind} {'yes' if equal else 'no'}" for kind, equal in same.items())
    print(f"  bitsandbytes on the {rows.device.type} reads back the same {rows.numel():,} values, bit for bit: {verdicts}."
          + (" So 4 bits do not need CUDA." if rows.device.type == "cpu" else ""))
    return {"gaussian": normal, "layer": layer, "different_values_in_32": distinct.float().mean().item(), "equals_library": same}


def held_bytes(packed: Tensor, state) -> dict[str, int]:
    """Bytes of every tensor that bitsandbytes keeps for one 4-bit weight: the packed codes and their QuantState."""
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
    """What the scales cost, by arithmetic and in bytes that bitsandbytes holds; what other block sizes would cost and save."""
    count = weight.numel()
    print(f"\nbits per parameter; double quantization keeps the scales in 8 bits, with one fp32 scale per {GROUP} of them")
    print(f"  {f'one fp32 scale per {BLOCK} weights':32}{f'4 + 32/{BLOCK}':26}= {bits_by_formula():.3f}")
    print(f"  {'double quantization':32}{f'4 + 8/{BLOCK} + 32/({BLOCK} x {GROUP})':26}= {bits_by_formula(double=True):.3f}")
    print(f"  bytes held by bitsandbytes for {name} ({weight.shape[0]} x {weight.shape[1]} = {count:,} weights)")
    one, two = (held_bytes(*F.quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK, compress_statistics=double)) for double in (False, True))
    sums = sum(one.values()), sum(two.values())
    bits = [8 * s / count for s in sums]
    over = [s - bits_by_formula(double=double) * count / 8 for s, double in zip(sums, (False, True))]
    print(f"    {'':24}{'one scale per block':>20}{'double quantization':>22}")
    for part, single, double in [*((part, one[part], two[part]) for part in one), ("sum", *sums)]:
        print(f"    {part:24}{single:>20,}{double:>22,}")
    print(f"    {'bits per parameter':24}{bits[0]:>20.3f}{bits[1]:>22.3f}")
    print(f"    {'more than the formula':24}{over[0]:>20,.0f}{over[1]:>22,.0f}   tables, mean, a last group that is not full")
    print(f"  other block sizes: relative error of nf4 on {rows.shape[0]} x {rows.shape[1]} of the weights, at bits per parameter by the formula")
    sizes = {size: block_size_errors(rows, size) for size in (32, 64, 128, 256, 1024)}
    for size, (single, double) in sizes.items():
        plain, nested = f"{100 * single:.3f}% at {bits_by_formula(size):.3f}", f"{100 * double:.3f}% at {bits_by_formula(size, True):.3f}"
        print(f"    {size:<24}{plain:>20}{nested:>22}")
    return {"bytes": {"one_scale": one, "double": two}, "bits_per_parameter": {"one_scale": bits[0], "double": bits[1]},
            "block_sizes": {str(size): {"one_scale": single, "double": double} for size, (single, double) in sizes.items()}}


def block_size_errors(rows: Tensor, size: int) -> tuple[float, float]:
    """Relative error of nf4 in blocks of `size`: with fp32 scales, and with scales in bitsandbytes' 8-bit dynamic type.

    The 4-bit step is formats.py's: on a CPU, bitsandbytes 0.50.2 reads back wrong values where a row is not whole blocks.
    """
    blocks, levels = to_blocks(rows, size), CODEBOOKS["nf4"]
    codes, absmax = encode_levels(blocks, levels)
    mean = absmax.mean()
    nested = F.dequantize_blockwise(*F.quantize_blockwise(absmax - mean, blocksize=GROUP)) + mean
    single, double = (relative_error(blocks, decode_levels(codes, levels, scale)) for scale in (absmax, nested))
    return single, double


def show_levels(gaussian: Tensor) -> dict:
    """NF4's levels, the normal distribution below each, and how often Gaussian blocks use it."""
    levels, outermost = CODEBOOKS["nf4"], NormalDist().inv_cdf(OUTERMOST)
    difference = (levels - F.get_4bit_type("nf4", device="cpu")).abs().max().item()
    below = [NormalDist().cdf(level * outermost) for level in levels.tolist()]
    used = round_trip(gaussian, "nf4")[0].flatten().bincount(minlength=16) / gaussian.numel()
    entropy = -(used * used.log2()).sum().item()
    print(f"\nnf4's levels are normal quantiles: even steps of probability below zero, and above (level 1 at {outermost:.3f} standard deviations)")
    for label, row in (("level", levels), ("P(z < level)", below), ("codes used, %", 100 * used)):
        print(f"  {label:15}" + "".join(f"{value:>7.{1 if label[-1] == '%' else 3}f}" for value in row))
    furthest = gaussian.abs().amax(1).mean().item()
    print(f"  Difference from bitsandbytes' table: at most {difference:.2g}. Gaussian blocks of {BLOCK} use the codes unevenly ({entropy:.2f} bits")
    print(f"  of information in 4): their largest value, scaled to 1, lies at {furthest:.2f} standard deviations on average, not at {outermost:.2f}.")
    return {"levels": levels.tolist(), "probability_below": below, "used": used.tolist(), "entropy_bits": entropy, "largest_difference": difference}


def show_weight_errors(model) -> dict:
    """Print weight_errors of a 16 or 32-bit model: a row per module type, the types from the smallest error to the largest."""
    errors = weight_errors(model)
    order = sorted(TYPES, key=errors["all"].get)
    print(f"\nrelative error over all {errors['layers']} linear layers, from 16-bit weights")
    print(f"  {'':14}" + "".join(f"{kind:>17}" for kind in order))
    for module, row in {**errors["by_module"], "all": errors["all"]}.items():
        print(f"  {module:14}" + "".join(f"{100 * row[kind]:>16.2f}%" for kind in order))
    return errors
