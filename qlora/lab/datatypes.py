"""What a data type keeps of one number, of a block of 64 weights, of a layer and of a whole model.

The formats are written out in formats.py. Here they meet real weights, and are compared with torch's and
bitsandbytes' own. What the scales of the blocks cost is in scales.py.
"""

from collections import Counter, defaultdict
from pathlib import Path

import bitsandbytes.functional as F
import torch
from torch import Tensor

from qlora.cli import UserError
from qlora.lab import formats
from qlora.lab.activations import show_activations
from qlora.lab.formats import BLOCK, CODEBOOKS, TYPES, relative, round_trip, to_blocks
from qlora.lab.microscaling import show_microscaling
from qlora.lab.scales import draw_levels, show_bits, show_levels
from qlora.measures import most_values_in_32, relative_error
from qlora.tables import table, table_of
from qlora.weights import linear_layers

SHOWN = ("int8", "int4", "fp4", "nf4")  # of one number and of one block; they need a scale
NUMBER = 0.1
GAUSSIAN = (4096, BLOCK)


@formats.one_thread()
def show_datatypes(base, levels_png: Path) -> dict:
    """Print what the data types make of a 16 or 32-bit model's weights and activations; draw the levels."""
    name, layer = linear_layers(base.model)[0]
    found = show_layer(layer.weight.detach(), name)
    draw_levels(levels_png, layer.weight, name)
    weights = show_weight_errors(base.model)
    return {**found, "model": weights, "activations": show_activations(base.model, base.tokenizer)}


def show_layer(weight: Tensor, name: str) -> dict:
    """Print what the data types make of a number and of a layer's `weight` (out, in)."""
    rows = weight[: max(1, 2**20 // weight.shape[1])].float()  # a million weights say as much as all
    gaussian = torch.randn(GAUSSIAN, generator=torch.Generator().manual_seed(0))
    block = to_blocks(weight.flatten()[:BLOCK]).cpu()
    return {
        "device": weight.device.type,
        "layer": name,
        "number": show_number(NUMBER, block),
        "block": show_block(block, name),
        "errors": show_errors(rows, gaussian, name),
        "microscaling": show_microscaling(weight.float(), rows, gaussian, name),
        "bits": show_bits(weight, rows, name),
        "levels": show_levels(gaussian),
    }


def show_number(number: float, block: Tensor) -> dict:
    """One number in every type; where a scale is needed, it is that of `block` with the number in it."""
    scale = max(block.abs().max().item(), abs(number))
    single = formats.FLOATS[0].decode(formats.FLOATS[0].encode(number))  # torch rounds to fp32 first
    rows = []
    for kind in formats.FLOATS:
        code = kind.encode(number if kind is formats.FLOATS[0] else single)
        sign, exponent, mantissa = kind.parts(code)
        digits = f"{'-' if sign else '+'}{mantissa / 2**kind.mantissa_bits + (exponent > 0):.7g}"
        means = f"{digits} x 2^{max(exponent - 1, 0) + kind.lowest}"
        library = torch.tensor(single).to(kind.dtype).double().item()
        rows.append((kind.name, kind.spell(code), means, kind.decode(code), library))
    values = to_blocks(torch.tensor([number, scale]))
    for kind in SHOWN:
        codes, _, back = round_trip(values, kind)
        code = codes[0, 0].item()
        level = f"{code} / 127" if kind == "int8" else f"level {CODEBOOKS[kind][code].item():+.4f}"
        library = None if kind == "int4" else library_round_trip(values, kind)[0, 0].item()
        rows.append((kind, spell_code(kind, code), f"{level} x {scale:.6g}", back[0, 0].item(), library))
    found, cells = {}, []
    for kind, bits, means, value, library in rows:
        error = abs(value - number) / abs(number)
        found[kind] = {"bits": bits, "value": value, "relative_error": error, "library": library}
        same = "-" if library is None else "the same" if library == value else f"{library!r}"
        cells.append((kind, bits, means, f"{value:.10g}", f"{error:.2e}", same))
    print(f"one number: {number!r}; library: what torch (floats) or bitsandbytes reads back")
    print(table(["type", "bits", "which means", "reads back", "relative error", "library"], cells, left=3))
    print(f"  {', '.join(SHOWN)} need a scale: {scale:.6g}, the largest value in the block below.")
    return {"number": number, "scale": scale, "types": found}


def spell_code(kind: str, code: int) -> str:
    """int8, int4: whole numbers in two's complement; fp4: sign and magnitude; nf4: place in its table."""
    if kind == "int8":
        return f"{code & 255:08b}"
    bits = f"{(code - 7) & 15 if kind == 'int4' else code:04b}"
    return f"{bits[0]} {bits[1:]}" if kind == "fp4" else bits


def library_round_trip(values: Tensor, kind: str) -> Tensor:
    """What bitsandbytes reads back of (rows, n) fp32. Scales: int8 per row, fp4 and nf4 per block of 64."""
    if kind == "int8":
        return F.int8_vectorwise_dequant(*F.int8_vectorwise_quant(values)[:2])
    return F.dequantize_4bit(*F.quantize_4bit(values, quant_type=kind, blocksize=BLOCK))


def show_block(block: Tensor, name: str) -> dict:
    """(1, 64) weights in the types that share a scale: codes and values of the first eight."""
    rows = [("16 bits", "", "value", *(f"{w:.4f}" for w in block[0, :8]))]
    found = {}
    for kind in SHOWN:
        codes, absmax, back = round_trip(block, kind)
        error = relative_error(block, back)
        first = [code if kind == "int8" else spell_code(kind, code) for code in codes[0, :8].tolist()]
        rows.append((kind, f"{error:.2%}", "code", *first))
        rows.append(("", "", "value", *(f"{value:.4f}" for value in back[0, :8])))
        found[kind] = {"scale": absmax.item(), "codes": codes[0].tolist(), "relative_error": error}
    scale = f"{block.abs().max():.6g}"
    print(f"\none block: the first {BLOCK} weights of {name}; their scale is the largest value, {scale}")
    print(table(["type", "relative error", "", *(f"w{i}" for i in range(8))], rows))
    return found


def show_errors(rows: Tensor, gaussian: Tensor, name: str) -> dict:
    """Each type's error on Gaussian weights and on a layer's; whether bitsandbytes reads back the same."""
    normal, layer = relative(formats.squared_errors(gaussian)), relative(formats.squared_errors(rows))
    shown = []
    for kind in sorted(TYPES, key=normal.get):
        levels = 255 if kind == "int8" else len(CODEBOOKS[kind].unique())
        shown.append((kind, levels, f"{normal[kind]:.2%}", f"{layer[kind]:.2%}"))
    print(f"\nrelative error |w - w'| / |w|; one fp32 scale per block of {BLOCK} (int8: per row)")
    sizes = [f"{given.shape[0]} x {given.shape[1]}" for given in (gaussian, rows)]
    print(table(["type", "levels", f"Gaussian ({sizes[0]})", f"{name} ({sizes[1]})"], shown))
    if normal["fp4"] > normal["int4"] > normal["fp4 E2M1"]:
        own, mx = (1 / CODEBOOKS[k][CODEBOOKS[k] > 0].min().item() for k in ("fp4", "fp4 E2M1"))
        print(
            "  The QLoRA paper ranks NF4, FP4, Int4 (perplexity). Here bitsandbytes' fp4 comes after int4:\n"
            f"  its smallest level, 1/{own:.0f} of the largest, is almost a second zero. With 1/{mx:.0f}\n"
            "  as in the MX standard (fp4 E2M1), it comes before the int4 of 15 levels."
        )
    different = torch.tensor([len(group.unique()) for group in rows.reshape(-1)[: 1024 * 32].split(32)])
    mean, most = different.float().mean().item(), most_values_in_32(rows)
    origin = ": these were unpacked from 4 bits" if most <= 16 else ""
    print(f"  32 neighbouring weights of the layer have {mean:.1f} different values, at most {most}{origin}.")
    same = {}
    for kind in ("fp4", "nf4"):
        ours, theirs = round_trip(to_blocks(rows), kind)[2], to_blocks(library_round_trip(rows, kind))
        same[kind] = torch.equal(ours, theirs)
    verdicts = ", ".join(f"{kind} {'yes' if equal else 'no'}" for kind, equal in same.items())
    end = " So 4 bits do not need CUDA." if rows.device.type == "cpu" else ""
    read = f"bitsandbytes on the {rows.device.type} reads back the same {rows.numel():,} values"
    print(f"  {read}, bit for bit: {verdicts}.{end}")
    return {"gaussian": normal, "layer": layer, "different_values_in_32": mean, "equals_library": same}


def show_weight_errors(model) -> dict:
    """Print each type's relative error over the linear layers (without the head) of a 16 or 32-bit model.

    {"all": {type: error}, "by_module": {"q_proj": {type: error}, …}, "layers": count}
    Raises UserError if the weights are quantized.
    """
    sums: dict[str, Counter] = defaultdict(Counter)
    layers = linear_layers(model)
    for name, layer in layers:
        if not layer.weight.is_floating_point():
            held = f"{name} is quantized already ({layer.weight.dtype})"
            raise UserError(f"{held}: data types are compared from 16-bit weights; name the original model")
        errors = formats.squared_errors(layer.weight)
        for group in ("all", name.rsplit(".", 1)[-1]):
            sums[group].update(errors)
    everything = relative(sums.pop("all"))
    by_module = {module: relative(sums[module]) for module in sorted(sums)}
    columns = {"": "{module}"} | {kind: f"{{{kind}:.2%}}" for kind in sorted(TYPES, key=everything.get)}
    print(f"\nrelative error over all {len(layers)} linear layers, from 16-bit weights")
    print(table_of([{"module": m, **row} for m, row in {**by_module, "all": everything}.items()], columns))
    return {"all": everything, "by_module": by_module, "layers": len(layers)}
