"""Matrix products of frozen weights with LoRA beside them, for linear layers that read the same input.

q, k and v are one product, gate and up another. LoRA's A is appended to the frozen weights: the low-rank
x A^T comes out of the same product, and on the way back its gradient goes into the same one. What LoRA adds
is summed in fp32 whatever the products are computed in: added to 16-bit outputs, a young adapter's small
contribution would be rounded away.
"""

import math
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import is_fake

from qlora.cpu import kernels
from qlora.weights import dequantized


class Pool:
    """Buffers that are made once, and again when a wider batch comes."""

    def __init__(self):
        self.kept: dict = {}

    def __call__(self, name, *shape: int, dtype=torch.float32) -> torch.Tensor:
        size = 1
        for side in shape:
            size *= side
        if name not in self.kept or self.kept[name].numel() < size:
            self.kept.pop(name, None)  # first: both at once would double the peak
            self.kept[name] = torch.empty(size, dtype=dtype)
        return self.kept[name][:size].view(shape)


@dataclass
class Lora:
    """The adapter of one linear layer, as the products take it: A (rank, in), scaling * B (out, rank)."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scaling: float

    @property
    def key(self) -> tuple:
        return id(self.a), id(self.b), self.scaling


class Group:
    """Linear layers with one input, whose products are computed in `dtype` (fp32 or bf16).

    `matrix` (out + rank, in) holds their weights one below the other, then the A of each. Inputs, outputs and
    gradients are fp32, (tokens, width).
    """

    def __init__(self, layers: list[torch.nn.Linear], dtype: torch.dtype, rank: int):
        self.outs, self.inputs = [m.out_features for m in layers], layers[0].in_features
        self.out, self.rank, self.dtype = sum(self.outs), rank, dtype
        biases = [torch.zeros(m.out_features) if m.bias is None else m.bias.detach().float() for m in layers]
        self.bias = None if all(m.bias is None for m in layers) else torch.cat(biases)
        self.parts: list[tuple] = []  # of an adapter: columns of y, columns of x A^T, scaling * B, scaling
        self.used = 0  # rows of A
        self.hold(layers)

    def hold(self, layers: list[torch.nn.Linear]) -> None:
        """Copy the frozen values, and make room for A, which begins at row `first`."""
        self.first = self.out
        self.matrix = torch.zeros(self.out + self.rank, self.inputs, dtype=self.dtype)
        for part, layer in zip(self.matrix[: self.out].split(self.outs), layers):
            part.copy_(dequantized(layer).detach())

    def frozen(self) -> list[torch.Tensor]:
        """What is multiplied with and must not change."""
        return [self.matrix[: self.first]]

    def take(self, lora: list[Lora | None]) -> list[torch.Tensor]:
        """Use these adapters, one a layer or None; returns where their A and B are to be copied to."""
        needed = sum(len(one.a) for one in lora if one)
        if needed > self.rank:
            self.rank = needed
            frozen = self.matrix[: self.first]
            self.matrix = torch.cat([frozen, self.matrix.new_zeros(needed, self.inputs)])
        self.parts, there, at, rank = [], [], 0, 0
        for out, one in zip(self.outs, lora):
            if one:
                r = len(one.a)
                b = torch.empty(out, r, dtype=self.dtype)
                self.parts.append((slice(at, at + out), slice(rank, rank + r), b, one.scaling))
                there += [self.matrix[self.first + rank : self.first + rank + r], b]
                rank += r
            at += out
        self.used = rank
        return there

    def up(self, x, pool: Pool, name, low_name) -> tuple[torch.Tensor, torch.Tensor]:
        """(y = x W^T + bias + s (x A^T) B^T, x A^T); y lies in a buffer whose rows may be longer."""
        tokens = len(x)
        whole = pool((name, self.dtype), tokens, len(self.matrix), dtype=self.dtype)
        torch.mm(self._terms(x, pool), self.matrix.t(), out=whole)
        y, low = whole[:, : self.out], pool(low_name, tokens, self.rank, dtype=self.dtype)
        low.copy_(whole[:, self.out :])
        if self.dtype != torch.float32:
            y = pool(name, tokens, self.out).copy_(y)
        if self.bias is not None:
            y += self.bias
        for columns, ranks, b, _ in self.parts:
            if self.dtype == torch.float32:
                y[:, columns].addmm_(low[:, ranks], b.t())
            else:
                y[:, columns].add_(low[:, ranks] @ b.t())
        return y, low

    def gradient_buffer(self, pool: Pool, name, tokens: int) -> torch.Tensor:
        """Where the gradient of y is to be written: (tokens, out), with room for LoRA's beside it."""
        return pool(name, tokens, len(self.matrix))[:, : self.out]

    def down(self, dy, x, low, pool: Pool, name) -> tuple[torch.Tensor | None, list]:
        """(gradient of x unless `name` is None, [gradients of A and B of each layer that has them])

        `dy` is a filled gradient_buffer.
        """
        whole = dy.as_strided((len(dy), len(self.matrix)), (dy.stride(0), 1))
        if self.dtype != torch.float32:
            whole = pool("down_terms", *whole.shape, dtype=self.dtype)
            dy = whole[:, : self.out].copy_(dy)
        dlow, gradients, x = whole[:, self.out :], [], self._terms(x, pool)
        dlow[:, self.used :] = 0  # room for a larger adapter
        for columns, ranks, b, scaling in self.parts:
            dlow[:, ranks] = dy[:, columns] @ b
            da, db = dlow[:, ranks].t() @ x, dy[:, columns].t() @ low[:, ranks]
            gradients += [da.float(), db.float().mul_(scaling)]
        if name is None:
            return None, gradients
        if self.dtype == torch.float32:
            return torch.mm(whole, self.matrix, out=pool(name, len(dy), self.inputs)), gradients
        dx = torch.mm(
            whole, self.matrix, out=pool((name, self.dtype), len(dy), self.inputs, dtype=self.dtype)
        )
        return pool(name, len(dy), self.inputs).copy_(dx), gradients

    def _terms(self, x, pool: Pool):
        return x if self.dtype == torch.float32 else pool("terms", *x.shape, dtype=self.dtype).copy_(x)


class HalfGroup(Group):
    """The same with the frozen products in fp16 terms (half_products.cpp), LoRA's in fp32.

    The weights are packed twice, for the way forward and the way back; `matrix` (rank, in) is the A of each.
    """

    def hold(self, layers: list[torch.nn.Linear]) -> None:
        self.first, self.matrix = 0, torch.zeros(self.rank, self.inputs)
        weights = torch.cat([dequantized(m).detach().float() for m in layers])
        self.kernels, _ = kernels.load_half()
        # A power of two: what it divides keeps its digits.
        self.largest = 1.0 if is_fake(weights) else 2.0 ** math.ceil(math.log2(weights.abs().max()))
        sizes = (self.out, self.inputs), (self.inputs, self.out)
        self.forth, self.back = (torch.empty(kernels.packed_size(*s), dtype=torch.float16) for s in sizes)
        self.kernels.half_pack(weights, self.largest, self.forth)
        self.kernels.half_pack(weights.t(), self.largest, self.back)

    def frozen(self) -> list[torch.Tensor]:
        return [self.forth, self.back]

    def up(self, x, pool: Pool, name, low_name) -> tuple[torch.Tensor, torch.Tensor]:
        y = pool(name, len(x), self.out)
        self.kernels.half_product(x, self.forth, self.largest, y)
        low = torch.mm(x, self.matrix.t(), out=pool(low_name, len(x), self.rank))
        if self.bias is not None:
            y += self.bias
        for columns, ranks, b, _ in self.parts:
            y[:, columns].addmm_(low[:, ranks], b.t())
        return y, low

    def gradient_buffer(self, pool: Pool, name, tokens: int) -> torch.Tensor:
        return pool(name, tokens, self.out)

    def down(self, dy, x, low, pool: Pool, name) -> tuple[torch.Tensor | None, list]:
        dx, gradients = None, []
        if name is not None:
            dx = pool(name, len(dy), self.inputs)
            self.kernels.half_product(dy, self.back, self.largest, dx)
        for columns, ranks, b, scaling in self.parts:
            dlow = dy[:, columns] @ b
            if dx is not None:
                dx.addmm_(dlow, self.matrix[ranks])
            gradients += [dlow.t() @ x, (dy[:, columns].t() @ low[:, ranks]).mul_(scaling)]
        return dx, gradients
