"""Wrong answers to the exercises of lesson 1: e1_read_float__… is read_float with a mistake."""

import torch


def e1_read_float__always_a_leading_one(bits):
    sign, exponent, mantissa = bits.split()
    offset = 2 ** (len(exponent) - 1) - 1
    size = (1 + int(mantissa, 2) / 2 ** len(mantissa)) * 2.0 ** (int(exponent, 2) - offset)
    return -size if sign == "1" else size


def e1_read_float__small_numbers_at_half(bits):
    """The power of a field of zeros is 1 - offset, not 0 - offset."""
    sign, exponent, mantissa = bits.split()
    power, offset = int(exponent, 2), 2 ** (len(exponent) - 1) - 1
    size = (int(mantissa, 2) / 2 ** len(mantissa) + (power > 0)) * 2.0 ** (power - offset)
    return -size if sign == "1" else size


def e1_read_float__infinity_in_every_format(bits):
    sign, exponent, mantissa = bits.split()
    power, offset = int(exponent, 2), 2 ** (len(exponent) - 1) - 1
    if power == 2 ** len(exponent) - 1:
        return float("inf")
    size = (int(mantissa, 2) / 2 ** len(mantissa) + (power > 0)) * 2.0 ** (max(power, 1) - offset)
    return -size if sign == "1" else size


def e2_to_codes__largest_with_its_sign(block, levels):
    scale = block.max()
    return ((block / scale.clamp(min=1e-38))[:, None] - levels).abs().argmin(1), scale


def e2_to_codes__the_level_below(block, levels):
    scale = block.abs().max()
    return (torch.bucketize(block / scale.clamp(min=1e-38), levels, right=True) - 1).clamp(
        0, len(levels) - 1
    ), scale


def e2_to_codes__zero_divided_by_zero(block, levels):
    scale = block.abs().max()
    return ((block / scale)[:, None] - levels).abs().argmin(1), scale


def e2_from_codes__without_the_scale(codes, scale, levels):
    return levels[codes]


def e3_bits_per_weight__group_of_weights(bits, block, scale_bits, group=0):
    """A group is of scales: block x group weights share the second one."""
    return bits + scale_bits / block + (32 / group if group else 0)


def e3_model_bytes__everything_quantized(model, bits):
    return sum(p.numel() for p in model.parameters()) * bits / 8


def e3_model_bytes__the_last_matrix_quantized(model, bits):
    linear = {m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)}
    quantized = sum(w.numel() for w in linear)
    return quantized * bits / 8 + (sum(p.numel() for p in model.parameters()) - quantized) * 2


def e3_model_bytes__shared_twice(model, bits):
    last = model.get_output_embeddings()
    sizes = [(m, m.weight.numel()) for m in model.modules() if getattr(m, "weight", None) is not None]
    return sum(n * (bits / 8 if isinstance(m, torch.nn.Linear) and m is not last else 2) for m, n in sizes)
