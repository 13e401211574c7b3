"""MXFP4 and NVFP4, spelled out: E2M1 numbers whose scales take few bits themselves.

Sources: Open Compute's Microscaling Formats (MX) specification 1.0; NVIDIA's description of NVFP4.
"""

import torch
from torch import Tensor

from qlora.lab import formats
from qlora.lab.rounded import SCHEMES, decode, encode
from qlora.measures import relative_error
from qlora.packed import from_bytes
from qlora.tables import table

KINDS = ("mxfp4", "nvfp4")
E4M3 = next(kind for kind in formats.FLOATS if kind.name == "fp8 E4M3")
SHOWN_WEIGHTS = 8


def show_microscaling(weight: Tensor, rows: Tensor, gaussian: Tensor, name: str) -> dict:
    """Print the first numbers of `weight` (out, in) in both formats, and their errors.

    {format: {scale, scale_bits, codes, bits_per_weight, gaussian, layer}}; `rows` of the layer and `gaussian`
    numbers (rows, n) are what the errors are measured on.
    """
    cells = [("16 bits", "", "", *(f"{w:.4f}" for w in weight[0, :SHOWN_WEIGHTS].tolist()))]
    found, errors = {}, []
    for kind in KINDS:
        scheme, held = SCHEMES[kind], encode(weight, SCHEMES[kind])
        codes, scale = from_bytes(held["codes"])[0], held["scales"].flatten()[0]
        if kind == "mxfp4":
            bits, value, spelled = 8, 2.0 ** (int(scale) - 127), f"{int(scale):08b}"
            means = f"2^{int(scale) - 127}"
        else:
            bits, whole, code = 8, held["whole"].item(), scale.view(torch.uint8).item()
            value, spelled = scale.item() * whole, E4M3.spell(code)
            means = f"{scale.item():g} x {whole:.3g}"
        spell = lambda code: f"{code >> 3} {code >> 1 & 3:02b} {code & 1}"
        first = [spell(code) for code in codes[:SHOWN_WEIGHTS].tolist()]
        values = decode(held, scheme)[0, :SHOWN_WEIGHTS].tolist()
        cells.append((kind, spelled, f"x {means}", *first))
        cells.append(("", "", "value", *(f"{v:.4f}" for v in values)))
        apart = [relative_error(given, decode(encode(given, scheme), scheme)) for given in (gaussian, rows)]
        each = 4 + bits / scheme.group
        errors.append((kind, scheme.group, f"{each:.2f}", *(f"{e:.2%}" for e in apart)))
        found[kind] = {"scale": value, "scale_bits": spelled, "codes": codes[: scheme.group].tolist()}
        found[kind] |= {"bits_per_weight": each, "gaussian": apart[0], "layer": apart[1]}
    print(f"\nE2M1 numbers (sign, 2 bits of exponent, 1 of mantissa) with small scales: the first of {name}")
    print(table(["format", "bits of the scale", "", *(f"w{i}" for i in range(SHOWN_WEIGHTS))], cells))
    print(table(["format", "weights a scale", "bits a weight", "Gaussian", "layer"], errors))
    print(
        "  mxfp4's scale is a power of two (E8M0); nvfp4's is an E4M3 number, times one fp32 of the matrix."
    )
    return found
