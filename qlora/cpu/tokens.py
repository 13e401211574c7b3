"""Rows of tokens end to end: no padding, a common beginning once, nothing after the last wanted position."""

from dataclasses import dataclass

import torch

MULTIPLE = 16  # of flat tokens: few sizes of products, and libraries make a kernel for each
ALIKE = 0.75  # packed examples attend together if none is shorter than this share of the longest of them


@dataclass(frozen=True)
class Band:
    """Rows that attend together, each to itself: `tokens` are theirs in the flat order.

    `place` (rows, length) says which of these tokens is at a position, -1 for none; `owner` (tokens,) is the
    other direction, row * length + position; -1 for tokens that only fill up. `shared` tokens at the
    beginning stand in every row.
    """

    tokens: slice
    place: torch.Tensor
    owner: torch.Tensor
    shared: int

    @property
    def rows(self) -> int:
        return self.place.shape[0]

    @property
    def length(self) -> int:
        return self.place.shape[1]


@dataclass(frozen=True)
class FlatRows:
    """A batch as the decoder reads it: `ids` (tokens,), and where each token stands.

    `wanted` (positions,) are the flat tokens whose hidden states are asked for.
    """

    ids: torch.Tensor
    bands: tuple[Band, ...]
    wanted: torch.Tensor

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return max(band.length for band in self.bands)


def flatten(
    input_ids: torch.Tensor, wanted: torch.Tensor, position_ids: torch.Tensor | None = None
) -> FlatRows:
    """input_ids and `wanted` (a mask), both (rows, tokens) -> FlatRows, `wanted` in row-major order.

    A token never looks ahead, so what comes after a row's last wanted position is left out. The first
    tokens that all rows of a band have in common (the beginning of the chat template) are computed once.
    With `position_ids` that start again inside rows, each such part is a row of its own.
    """
    if position_ids is not None:
        input_ids, wanted = apart(input_ids, wanted, position_ids)
    counts = (wanted * torch.arange(1, wanted.shape[1] + 1)).amax(1).clamp(min=1)
    groups = [list(range(len(counts)))] if position_ids is None else like_lengths(counts.tolist())
    places, at = torch.full(wanted.shape, -1), 0
    ids, bands = [], []
    for group in groups:
        its_ids, place, owner, shared = _end_to_end(input_ids[group], counts[group])
        fill = -(at + len(its_ids)) % MULTIPLE if group is groups[-1] else 0
        its_ids, owner = (
            torch.nn.functional.pad(x, (0, fill), value=v) for x, v in ((its_ids, 0), (owner, -1))
        )
        places[group, : place.shape[1]] = place.long() + at
        bands.append(Band(slice(at, at + len(its_ids)), place, owner, shared))
        ids.append(its_ids)
        at += len(its_ids)
    return FlatRows(torch.cat(ids), tuple(bands), places[wanted])


def _end_to_end(input_ids: torch.Tensor, counts: torch.Tensor) -> tuple:
    """(ids of the first `counts` tokens of each row, one after the other; place, owner, shared: see Band)"""
    rows = len(input_ids)
    same = (input_ids == input_ids[:1]).all(0).int().cumprod(0).sum()
    shared = min(int(same), int(counts.min()) - 1) if rows > 1 else 0
    length = int(counts.max())
    position = torch.arange(length)
    alone = position < counts[:, None]  # tokens that are in the flat order because of this row
    alone[1:, :shared] = False
    place = torch.full((rows, length), -1, dtype=torch.int32)
    place[alone] = torch.arange(int(alone.sum()), dtype=torch.int32)
    place[:, :shared] = position[:shared].int()
    return input_ids[:, :length][alone], place, alone.flatten().nonzero()[:, 0].int(), shared


def apart(input_ids, wanted, position_ids) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, wanted) of packed rows, each example in a row of its own: where positions begin at 0."""
    positions = position_ids.flatten()
    example = (positions == 0).cumsum(0) - 1
    shape = int(example[-1]) + 1, int(positions.max()) + 1
    ids, asked = input_ids.new_zeros(shape), wanted.new_zeros(shape)
    ids[example, positions], asked[example, positions] = input_ids.flatten(), wanted.flatten()
    return ids, asked


def like_lengths(counts: list[int]) -> list[list[int]]:
    """Row numbers of about the same length together, the longest first: [9, 2, 8, 3] -> [[0, 2], [3], [1]]"""
    groups: list[list[int]] = []
    for row in sorted(range(len(counts)), key=lambda row: -counts[row]):
        if not groups or counts[row] < ALIKE * counts[groups[-1][0]]:
            groups.append([])
        groups[-1].append(row)
    return groups


def whole_rows(input_ids: torch.Tensor, wanted: int) -> FlatRows:
    """`wanted` positions of each row, of rows that begin differently: what a plan counts without values."""
    rows, length = input_ids.shape
    fill = -rows * length % MULTIPLE
    place = torch.arange(rows * length, dtype=torch.int32)
    owner = torch.nn.functional.pad(place, (0, fill), value=-1)
    ids = torch.nn.functional.pad(input_ids.flatten(), (0, fill))
    place = place.view(rows, length)
    band = Band(slice(0, len(ids)), place, owner, 0)
    return FlatRows(ids, (band,), place[:, :wanted].flatten().long())
