"""What is printed of MXFP4 and NVFP4 is what the codes and scales say, read by hand."""

import pytest
import torch

from qlora.lab.formats import FLOATS
from qlora.lab.microscaling import KINDS, show_microscaling
from qlora.lab.rounded import E2M1, SCHEMES, decode, encode


@pytest.fixture(scope="module")
def weight():
    return torch.randn(8, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found(weight):
    return show_microscaling(weight, weight, weight, "a layer")


def read(code: int) -> float:
    return (-1) ** (code >> 3) * E2M1[code & 7].item()


@pytest.mark.parametrize("kind", KINDS)
def test_codes_times_scale_are_the_values(weight, found, kind):
    group, held = SCHEMES[kind].group, encode(weight, SCHEMES[kind])
    by_hand = [read(code) * found[kind]["scale"] for code in found[kind]["codes"]]
    assert len(by_hand) == group
    assert by_hand == pytest.approx(decode(held, SCHEMES[kind])[0, :group].tolist(), rel=1e-6)


def test_bits_of_the_scales_read_by_the_book(found):
    assert 2.0 ** (int(found["mxfp4"]["scale_bits"], 2) - 127) == found["mxfp4"]["scale"]
    e4m3 = next(kind for kind in FLOATS if kind.name == "fp8 E4M3")
    code = int(found["nvfp4"]["scale_bits"].replace(" ", ""), 2)
    assert 0 < e4m3.decode(code) <= 448
    assert (found["mxfp4"]["bits_per_weight"], found["nvfp4"]["bits_per_weight"]) == (4.25, 4.5)


def test_errors_are_of_what_was_given(weight, found):
    assert found["mxfp4"]["gaussian"] == found["mxfp4"]["layer"] > found["nvfp4"]["layer"] > 0.05
    other = show_microscaling(weight, weight, 3 * weight.exp(), "a layer")
    assert other["nvfp4"]["gaussian"] != found["nvfp4"]["gaussian"]
