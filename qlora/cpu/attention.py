"""Causal attention of the decoder: each row with itself, in blocks of queries, forward and backward."""

from collections.abc import Iterator

import torch

from qlora.cpu.products import Pool
from qlora.cpu.tokens import Band, FlatRows

QUERY_BLOCK = 64  # queries whose scores exist at once; they need no keys that come later


class Attention:
    """`heads` query heads of width `d`, of which heads / groups share keys and values."""

    def __init__(self, kernels, heads: int, groups: int, d: int):
        self.kernels, self.heads, self.groups, self.d = kernels, heads, groups, d
        self.per = heads // groups

    def forward(self, qkv, rows: FlatRows, angles: tuple, pool: Pool, own) -> tuple[tuple, torch.Tensor]:
        """((q, k, v, ln of the softmax's sums), heads (tokens, heads * d)) of flat q, k, v.

        `angles`: cosine and sine of the rotary embedding; `own` makes the buffers that are kept.
        """
        places, d = sum(band.place.numel() for band in rows.bands), self.d
        q = own("q", places * self.heads, d)
        key, value = own("k", places * self.groups, d), own("v", places * self.groups, d)
        kept = q, key, value, own("logsum", places * self.heads)
        flat = own("heads", len(rows.ids), self.heads * d)
        for band, parts in self._bands(rows, *kept, pool("attended", *q.shape)):
            self._attend(qkv[band.tokens], band, parts, angles, pool)
            self.kernels.heads_to_flat(parts[-1], band.owner, flat[band.tokens], band.length)
        return kept, flat

    def backward(self, dflat, kept: tuple, rows: FlatRows, angles: tuple, pool: Pool, dqkv) -> None:
        """Fills the gradient `dqkv` of flat q, k, v; `dflat` is that of heads."""
        q, key, value, _ = kept
        dk, dv = pool("dk", *key.shape).zero_(), pool("dv", *value.shape).zero_()
        made = pool("attended", *q.shape), pool("dq", *q.shape), dk, dv
        for band, parts in self._bands(rows, *kept, *made):
            dout, *gradients = parts[4:]
            self.kernels.flat_to_heads(dflat[band.tokens], band.place, band.owner, dout)
            self._attend_backward(parts[:4], dout, gradients, pool)
            where = band.place, band.owner, *angles, dqkv[band.tokens], band.shared, self.per
            self.kernels.rotate_back(*gradients, *where)

    def _bands(self, rows: FlatRows, *buffers) -> Iterator[tuple[Band, list[torch.Tensor]]]:
        """Each band with its part of the buffers: a matrix for each of its rows and groups."""
        total, at = sum(band.place.numel() for band in rows.bands), 0
        for band in rows.bands:
            end, units = at + band.place.numel(), band.rows * self.groups
            parts = []
            for buffer in buffers:
                each = len(buffer) // total  # of its rows stand for a position
                parts.append(buffer[at * each : end * each].view(units, -1, *buffer.shape[1:]))
            yield band, parts
            at = end

    def _attend(self, qkv, band: Band, parts: list, angles: tuple, pool: Pool) -> None:
        q, key, value, logsum, out = parts
        self.kernels.rotate_in(qkv, band.place, *angles, q, key, value, self.per)
        for start, end in blocks(band.length):
            block = slice(start * self.per, end * self.per)
            scores = pool("scores", len(q), (end - start) * self.per, end)
            torch.bmm(q[:, block], key[:, :end].mT, out=scores)
            self.kernels.softmax(scores, self.d**-0.5, logsum[:, block], self.per, start)
            out[:, block] = torch.bmm(scores, value[:, :end])

    def _attend_backward(self, kept: list, dout, gradients: list, pool: Pool) -> None:
        (q, key, value, logsum), (dq, dk, dv) = kept, gradients
        for start, end in blocks(key.shape[1]):
            block = slice(start * self.per, end * self.per)
            shape = len(q), (end - start) * self.per, end
            p, dp = pool("scores", *shape), pool("dscores", *shape)
            torch.bmm(q[:, block], key[:, :end].mT, out=p)
            torch.bmm(dout[:, block], value[:, :end].mT, out=dp)
            self.kernels.softmax_backward(p, dp, self.d**-0.5, logsum[:, block], self.per, start)
            dv[:, :end].baddbmm_(p.mT, dout[:, block])
            dk[:, :end].baddbmm_(dp.mT, q[:, block])
            dq[:, block] = torch.bmm(dp, key[:, :end])


def blocks(length: int) -> list[tuple[int, int]]:
    """100 -> [(0, 64), (64, 100)]"""
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]
