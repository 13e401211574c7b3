"""Solutions of lesson 1."""

import torch


def read_float(bits: str) -> float:
    sign, exponent, mantissa = bits.split()
    offset = 2 ** (len(exponent) - 1) - 1
    fraction = int(mantissa, 2) / 2 ** len(mantissa)
    power = int(exponent, 2)
    # An exponent field of zeros: no leading 1, and the power of the field 1, so that the steps go on evenly
    # from the smallest number with a leading 1 down to zero.
    size = fraction * 2.0 ** (1 - offset) if power == 0 else (1 + fraction) * 2.0 ** (power - offset)
    return -size if sign == "1" else size


def to_codes(block, levels):
    # Without the sign: a block of -2 and 1 needs the scale 2, or -2 would be beyond the last level.
    # A block of zeros: 0 / 0 is NaN, and the "nearest" level to NaN is any.
    scale = block.abs().max()
    scaled = block / scale.clamp(min=1e-38)
    return (scaled[:, None] - levels).abs().argmin(1), scale


def from_codes(codes, scale, levels):
    return levels[codes] * scale


def bits_per_weight(bits: int, block: int, scale_bits: int, group: int = 0) -> float:
    # A scale is shared by `block` weights, a scale of scales by block x group of them.
    return bits + scale_bits / block + (32 / (block * group) if group else 0)


def model_bytes(model, bits: float) -> float:
    last = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not last]
    quantized = sum(m.weight.numel() for m in linear)
    everything = sum(p.numel() for p in model.parameters())  # parameters() yields a shared tensor once
    return quantized * bits / 8 + (everything - quantized) * 2
