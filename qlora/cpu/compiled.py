"""kernels.cpp and half_products.cpp, called with the pointers and sizes of tensors."""

import ctypes
from ctypes import c_float, c_long, c_void_p

KINDS = {"p": c_void_p, "l": c_long, "f": c_float}
# What each takes: p a pointer, l a long, f a float.
SIGNATURES = {
    "rms_norm": "pplpfppp" + "ll",
    "rms_backward": "pppppl" + "pl" + "ll",
    "gate_up": "plp" + "ll",
    "gate_up_backward": "ppl" + "pl" + "ll",
    "rotate_in": "plpppppp" + "lllll",
    "rotate_back": "ppppppp" + "llllllll",
    "heads_to_flat": "ppp" + "llll",
    "flat_to_heads": "pppp" + "llll",
    "softmax": "pfpl" + "lllll",
    "softmax_backward": "ppfpl" + "lllll",
}

HALF_SIGNATURES = {"pack": "pllllfp", "product": "plpfpl" + "lll"}


class Library:
    """Functions of a compiled library, each as `_name`."""

    def __init__(self, path: str, signatures: dict):
        library = ctypes.CDLL(path)
        for name, kinds in signatures.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [KINDS[kind] for kind in kinds], None
            setattr(self, f"_{name}", function)


class HalfProducts(Library):
    """half_products.cpp."""

    def __init__(self, path: str):
        super().__init__(path, HALF_SIGNATURES)

    def half_pack(self, weights, largest, packed):
        self._pack(weights.data_ptr(), *weights.stride(), *weights.shape, largest, packed.data_ptr())

    def half_product(self, x, packed, largest, y):
        self._product(*wide(x), packed.data_ptr(), largest, *wide(y), len(x), x.shape[1], y.shape[1])


class Kernels(Library):
    """The functions of plain.py by a compiled library."""

    def __init__(self, path: str):
        super().__init__(path, SIGNATURES)

    def rms_norm(self, x, add, weight, eps, total, y, scale):
        more = (None, 0) if add is None else (add.data_ptr(), add.stride(0))
        both = None if total is None else total.data_ptr()
        out = y.data_ptr(), scale.data_ptr()
        self._rms_norm(x.data_ptr(), *more, weight.data_ptr(), eps, both, *out, *x.shape)

    def rms_backward(self, dy, total, weight, scale, residual, out):
        first = pointers(dy, total, weight, scale)
        self._rms_backward(*first, *wide(residual), *wide(out), *total.shape)

    def gate_up(self, both, y):
        self._gate_up(*wide(both), y.data_ptr(), *y.shape)

    def gate_up_backward(self, dy, both, dboth):
        self._gate_up_backward(dy.data_ptr(), *wide(both), *wide(dboth), *dy.shape)

    def rotate_in(self, qkv, place, cosine, sine, q, k, v, per):
        sizes = *place.shape, k.shape[0] // place.shape[0], per, k.shape[-1]
        self._rotate_in(*wide(qkv), *pointers(place, cosine, sine, q, k, v), *sizes)

    def rotate_back(self, dq, dk, dv, place, owner, cosine, sine, dqkv, shared, per):
        sizes = len(owner), shared, *place.shape, dk.shape[0] // place.shape[0], per, dk.shape[-1]
        self._rotate_back(*pointers(dq, dk, dv, owner, cosine, sine), *wide(dqkv), *sizes)

    def heads_to_flat(self, heads, owner, flat, length):
        width = heads.shape[1] // length * heads.shape[2]
        sizes = len(owner), length, flat.shape[1] // width, width
        self._heads_to_flat(*pointers(heads, owner, flat), *sizes)

    def flat_to_heads(self, flat, place, owner, heads):
        groups = heads.shape[0] // place.shape[0]
        self._flat_to_heads(
            *pointers(flat, place, owner, heads), *place.shape, groups, flat.shape[1] // groups
        )

    def softmax(self, scores, scale, logsum, per, first):
        matrices, height, keys = scores.shape
        self._softmax(scores.data_ptr(), scale, *wide(logsum), matrices, height // per, per, keys, first)

    def softmax_backward(self, scores, dp, scale, logsum, per, first):
        matrices, height, keys = scores.shape
        sizes = matrices, height // per, per, keys, first
        self._softmax_backward(*pointers(scores, dp), scale, *wide(logsum), *sizes)


def pointers(*tensors) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def wide(tensor) -> tuple[int, int]:
    """Pointer and row stride."""
    return tensor.data_ptr(), tensor.stride(0)
