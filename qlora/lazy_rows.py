"""Rows that are read when they are asked for; what a split needs of all of them is kept in 18 bytes each."""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class LazyRows(Sequence):
    """A sequence of data.Row: `get` reads one by its place."""

    get: Callable[[int], object]
    places: np.ndarray  # (rows,) int64: what `get` is asked for
    labels: np.ndarray  # (rows,) int16
    hashes: np.ndarray  # (rows,) uint64, of the texts

    @classmethod
    def index(cls, rows: Iterable[tuple[int, object]], get: Callable[[int], object]) -> LazyRows:
        """Of (place, row) one after the other; the rows themselves are not kept."""
        places, labels, hashes = array("q"), array("h"), array("Q")
        for place, row in rows:
            places.append(place)
            labels.append(row.label)
            hashes.append(hash_of(row.text))
        kinds = zip((places, labels, hashes), (np.int64, np.int16, np.uint64))
        return cls(get, *(np.frombuffer(values, kind) for values, kind in kinds))

    @classmethod
    def of(cls, rows: Sequence) -> LazyRows:
        """Of rows that are in memory."""
        return rows if isinstance(rows, cls) else cls.index(enumerate(rows), rows.__getitem__)

    @classmethod
    def joined(cls, parts: Sequence[LazyRows]) -> LazyRows:
        """One part after the other."""
        starts = np.cumsum([0, *map(len, parts)]).tolist()

        def get(place: int):
            part = bisect.bisect_right(starts, place) - 1
            return parts[part][place - starts[part]]

        labels, hashes = (np.concatenate([getattr(p, name) for p in parts]) for name in ("labels", "hashes"))
        return cls(get, np.arange(starts[-1]), labels, hashes)

    def only(self, kept: np.ndarray) -> LazyRows:
        """Those that a mask or indices choose."""
        return LazyRows(self.get, self.places[kept], self.labels[kept], self.hashes[kept])

    def without_duplicates(self) -> LazyRows:
        """The first row of each text."""
        return self.only(np.sort(np.unique(self.hashes, return_index=True)[1]))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: int):
        return self.get(int(self.places[i]))


def hash_of(text: str) -> int:
    """64 bits: of 10 million different texts, two are taken for the same once in 300,000 files."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def labels_of(rows: Sequence) -> np.ndarray:
    """(rows,) int16"""
    if isinstance(rows, LazyRows):
        return rows.labels
    return np.fromiter((row.label for row in rows), np.int16, len(rows))
