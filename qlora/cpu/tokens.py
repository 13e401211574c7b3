"""Rows of tokens end to end: no padding, a common beginning once, nothing after the last wanted position."""

from dataclasses import dataclass

import torch

MULTIPLE = 16  # of flat tokens: few sizes of products, and libraries make a kernel for each


@dataclass(frozen=True)
class FlatRows:
    """A batch as the decoder reads it: `ids` (tokens,), and where each token stands.

    `place` (rows, length) says which flat token is at a position, -1 for none; `owner` (tokens,) is the other
    direction, row * length + position; -1 for tokens that only fill up. `wanted` (positions,) are the flat
    tokens whose hidden states are asked for; `shared` tokens at the beginning stand in every row.
    """

    ids: torch.Tensor
    place: torch.Tensor
    owner: torch.Tensor
    wanted: torch.Tensor
    shared: int

    @property
    def rows(self) -> int:
        return self.place.shape[0]

    @property
    def length(self) -> int:
        return self.place.shape[1]


def flatten(input_ids: torch.Tensor, wanted: torch.Tensor) -> FlatRows:
    """input_ids and `wanted` (a mask), both (rows, tokens) -> FlatRows, `wanted` in row-major order.

    A token never looks ahead, so what comes after a row's last wanted position is left out. The first
    tokens that all rows have in common (the beginning of the chat template) are computed once.
    """
    rows, width = input_ids.shape
    counts = (wanted * torch.arange(1, width + 1)).amax(1).clamp(min=1)
    same = (input_ids == input_ids[:1]).all(0).int().cumprod(0).sum()
    shared = min(int(same), int(counts.min()) - 1) if rows > 1 else 0
    length = int(counts.max())
    position = torch.arange(length)
    kept = position < counts[:, None]
    alone = kept.clone()  # tokens that are in the flat order because of this row
    alone[1:, :shared] = False
    place = torch.full((rows, length), -1, dtype=torch.int32)
    place[alone] = torch.arange(int(alone.sum()), dtype=torch.int32)
    place[:, :shared] = position[:shared].int()
    owner = alone.flatten().nonzero()[:, 0].int()
    ids = input_ids[:, :length][alone]
    fill = -len(ids) % MULTIPLE
    ids, owner = (torch.nn.functional.pad(x, (0, fill), value=v) for x, v in ((ids, 0), (owner, -1)))
    return FlatRows(ids, place, owner, place[wanted[:, :length]].long(), shared)


def whole_rows(input_ids: torch.Tensor, wanted: int) -> FlatRows:
    """`wanted` positions of each row, of rows that begin differently: what a plan counts without values."""
    rows, length = input_ids.shape
    fill = -rows * length % MULTIPLE
    place = torch.arange(rows * length, dtype=torch.int32)
    owner = torch.nn.functional.pad(place, (0, fill), value=-1)
    ids = torch.nn.functional.pad(input_ids.flatten(), (0, fill))
    place = place.view(rows, length)
    return FlatRows(ids, place, owner, place[:, :wanted].flatten().long(), 0)
