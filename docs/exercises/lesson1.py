"""Exercises of lesson 1: write the bodies, then `pytest docs/exercises -k lesson1`."""


def read_float(bits: str) -> float:
    """The number that a code of a floating-point format stands for.

    `bits`: sign, exponent and mantissa with a space between them, of any length: "0 01011 1001100110" (fp16)
    is 0.0999755859375, "1 0111 000" (E4M3) is -1.0. The offset follows from the number of exponent bits:
    2^(E - 1) - 1. The code is always one of a finite number: infinity and NaN need not be told apart.
    """
    raise NotImplementedError("exercise 1.1")


def to_codes(block, levels):
    """(codes, scale) of a block of weights.

    `block`: tensor (64,) in fp32. `levels`: tensor (16,), ascending, from -1 to 1. Codes: tensor (64,) of
    whole numbers, the place of the level that is nearest to weight / scale. Scale: a tensor with one number.
    With the levels -1, -0.5, 0, 0.5, 1 the block 0.2, -0.4, 0.05 has the scale 0.4 and the codes 3, 0, 2.
    A block of zeros gets the code of the level nearest to zero.
    """
    raise NotImplementedError("exercise 1.2")


def from_codes(codes, scale, levels):
    """The weights that codes and scale stand for: tensor (64,)."""
    raise NotImplementedError("exercise 1.2")


def bits_per_weight(bits: int, block: int, scale_bits: int, group: int = 0) -> float:
    """Bits that a weight takes with its share of the scales.

    `bits` of a code; `block` weights share a scale of `scale_bits`. If `group` is not 0, that many scales
    share one more scale of 32 bits. bits_per_weight(4, 64, 32) is 4.5.
    """
    raise NotImplementedError("exercise 1.3")


def model_bytes(model, bits: float) -> float:
    """Bytes of a model of transformers whose matrices are quantized to `bits` a weight.

    As bitsandbytes does it: of the torch.nn.Linear modules in model.modules() all are quantized but one, the
    last of the model, `model.get_output_embeddings()`. Every other weight stays in 16 bits. In many models
    the first table and that last matrix are one and the same tensor: it is there once. The model may be
    without numbers (on the "meta" device): ask for shapes only.
    """
    raise NotImplementedError("exercise 1.3")
