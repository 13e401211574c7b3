"""Number formats written out to be read: floats of 8 to 32 bits, 4-bit codebooks, int8.

Each gives what torch's casts and bitsandbytes' CPU code give, bit for bit (tests/lab/test_datatypes.py).
"""

import math
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

BLOCK = 64  # weights that share one scale, and
GROUP = 256  # scales that share a second-level scale: what bitsandbytes gives Linear4bit
OUTERMOST = 0.9677083  # probability below NF4's largest level: the mean of 1 - 1/(2 x 15) and 1 - 1/(2 x 16)


@contextmanager
def one_thread():
    """For many small operations: on a busy machine, threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class FloatFormat:
    """Sign, exponent, mantissa as in IEEE 754. `saturates`: what is too large becomes the largest number."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    dtype: torch.dtype
    saturates: bool = False

    @property
    def lowest(self) -> int:
        """Exponent of the smallest normal number. Below it the step size stays the same (denormals)."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def largest(self) -> int:
        """Code of the largest finite number. An exponent of ones: infinity or NaN; in E4M3 a single NaN."""
        unused = 2 if self.saturates else 2**self.mantissa_bits + 1
        return 2 ** (self.exponent_bits + self.mantissa_bits) - unused

    def encode(self, number: float) -> int:
        """Nearest code; a tie goes to the even one. fp8 E4M3: 0.1 -> 0b0_0011_101, which is 1.625 x 2^-4."""
        magnitude = abs(number)
        exponent = max(math.frexp(magnitude)[1] - 1, self.lowest) if magnitude else self.lowest
        steps = round(math.ldexp(magnitude, self.mantissa_bits - exponent))  # of the last mantissa bit
        # A normal number has 2^mantissa_bits steps or more: they carry its leading 1 into the exponent field.
        code = ((exponent - self.lowest) << self.mantissa_bits) + steps
        sign = int(math.copysign(1, number) < 0) << (self.exponent_bits + self.mantissa_bits)
        return sign + min(code, self.largest + (not self.saturates))  # the code after the largest is infinity

    def parts(self, code: int) -> tuple[int, int, int]:
        """(sign, exponent field, mantissa field)"""
        sign, rest = divmod(code, 1 << (self.exponent_bits + self.mantissa_bits))
        return sign, *divmod(rest, 1 << self.mantissa_bits)

    def decode(self, code: int) -> float:
        sign, exponent, mantissa = self.parts(code)
        steps = mantissa + (1 << self.mantissa_bits) * (exponent > 0)
        finite = (exponent << self.mantissa_bits) + mantissa <= self.largest
        power = max(exponent - 1, 0) + self.lowest - self.mantissa_bits
        return math.copysign(math.ldexp(steps, power) if finite else math.inf, -sign or 1)

    def spell(self, code: int) -> str:
        """bf16, code of 0.1 -> '0 01111011 1001101'"""
        sign, exponent, mantissa = self.parts(code)
        return f"{sign} {exponent:0{self.exponent_bits}b} {mantissa:0{self.mantissa_bits}b}"


FLOATS = (
    FloatFormat("fp32", 8, 23, torch.float32),
    FloatFormat("fp16", 5, 10, torch.float16),
    FloatFormat("bf16", 8, 7, torch.bfloat16),
    FloatFormat("fp8 E4M3", 4, 3, torch.float8_e4m3fn, saturates=True),
    FloatFormat("fp8 E5M2", 5, 2, torch.float8_e5m2),
)


def normal_levels() -> Tensor:
    """NF4's 16 levels, as bitsandbytes' create_normal_map derives them (QLoRA, arXiv 2305.14314, section 3).

    Quantiles of the normal distribution at even steps of probability: eight steps from 1/2 up to OUTERMOST,
    seven from 1/2 down to 1 - OUTERMOST. Zero is a level, so that a zero weight stays zero.
    """
    quantile = NormalDist().inv_cdf
    up, down = ([quantile(p) for p in torch.linspace(OUTERMOST, 0.5, n)[:-1].tolist()] for n in (9, 8))
    return torch.tensor([-q for q in down] + [0.0] + up[::-1]) / max(up)


def signed(magnitudes: list[float]) -> Tensor:
    """Levels of codes that begin with a sign bit, divided by the largest: [0, 1] -> [0, 1, -0, -1]"""
    return torch.tensor(magnitudes + [-m for m in magnitudes]) / max(magnitudes)


# Levels in the order of their codes, in units of the block's largest absolute value.
CODEBOOKS = {
    "nf4": normal_levels(),
    # bitsandbytes' own order of codes and smallest number: 1/192 of the largest, where E2M1 has 1/12.
    "fp4": signed([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]),
    "fp4 E2M1": signed([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]),  # Open Compute's MX specification
    "int4": torch.arange(-7, 8) / 7,  # symmetric: 15 levels, one code unused
    "int4, 16 levels": torch.arange(-8, 8) / 8,  # cuts the block's largest positive value to 7/8
}
TYPES = (*CODEBOOKS, "int8")


def to_blocks(weight: Tensor, size: int = BLOCK) -> Tensor:
    """(…) -> (blocks, size) in fp32; a shorter last block is filled with zeros, which add no error."""
    flat = weight.detach().float().reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def encode_levels(blocks: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """(blocks, n) -> codes of the nearest levels (blocks, n), and the largest absolute values (blocks, 1).

    Counting the midpoints below a value finds its nearest level. As in bitsandbytes' CPU code, a value on a
    midpoint goes to the lower level, and the scale has a floor: a block of zeros must not divide by zero.
    """
    absmax = blocks.abs().amax(1, keepdim=True)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))
    ascending, code = levels.to(blocks.device).sort(stable=True)
    rank = torch.zeros_like(scaled, dtype=torch.uint8)
    for midpoint in ((ascending[:-1] + ascending[1:]) / 2).tolist():
        rank += scaled > midpoint
    return look_up(code.to(torch.uint8), rank), absmax


def decode_levels(codes: Tensor, levels: Tensor, absmax: Tensor) -> Tensor:
    return look_up(levels.to(codes.device), codes) * absmax


def look_up(table: Tensor, places: Tensor) -> Tensor:
    """table[places], several times faster on a CPU"""
    return table.index_select(0, places.flatten().int()).view_as(places)


def encode_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, n) -> whole numbers from -127 to 127, and scales (rows, 1); ties go to the even number."""
    absmax = rows.abs().amax(1, keepdim=True)
    return (rows * (127 / absmax)).nan_to_num().round().to(torch.int8), absmax  # a row of zeros: 0 x infinity


def decode_int8(codes: Tensor, absmax: Tensor) -> Tensor:
    return codes * absmax * (1 / 127)


def round_trip(values: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, values read back) of (rows, n) in a type of TYPES, one scale per row."""
    if kind == "int8":
        codes, absmax = encode_int8(values)
        return codes, absmax, decode_int8(codes, absmax)
    codes, absmax = encode_levels(values, CODEBOOKS[kind])
    return codes, absmax, decode_levels(codes, CODEBOOKS[kind], absmax)


def squared_errors(weight: Tensor) -> dict[str, float]:
    """|w - w'|^2 of each type in TYPES (int8: scale per row, others: per block of 64), and 'norm': |w|^2."""
    total: dict[str, float] = defaultdict(float)
    # A million weights at a time: temporaries stay small, and 64 rows are always whole blocks.
    for rows in weight.detach().split(max(1, 2**20 // (BLOCK * weight.shape[1])) * BLOCK):
        rows = rows.float()
        blocks = to_blocks(rows)
        total["norm"] += rows.square().sum().item()
        for kind in TYPES:
            values = rows if kind == "int8" else blocks
            total[kind] += (round_trip(values, kind)[2] - values).square_().sum().item()
    return dict(total)


def relative(errors: dict[str, float]) -> dict[str, float]:
    """|w - w'| / |w| from the sums of squared_errors"""
    return {kind: math.sqrt(errors[kind] / errors["norm"]) if errors["norm"] else 0.0 for kind in TYPES}
