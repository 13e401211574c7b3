"""Counting the bytes that tensors hold while real code runs, on tensors with or without data.

Under torch's FakeTensorMode every operator returns tensors of the right shape and dtype and computes nothing. Running
the real model, loss, backward pass and optimizer on such tensors, and counting their storages, tells what a step will
hold: for any architecture, in seconds, without weights.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, by the `tag` under which they were made, and their peak.

    A storage counts once, however many views look at it, from the operator that returns it until it is freed.
    `block`: sizes are rounded up to it (the CUDA caching allocator hands out multiples of 512 bytes).
    `workspace(operator, args, out)`: bytes that a kernel takes inside for itself, which no mode can see.
    """

    def __init__(self, block: int = 1, workspace=None):
        super().__init__()
        self.block, self.workspace = block, workspace
        self.tag = "other"
        self.live: Counter = Counter()
        self.now = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self._seen: dict[int, list] = {}  # storage -> [reference, tag]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        if self.workspace and (extra := self.workspace(function, args, out)):
            self._raise_peak(extra)
        return out

    def count_existing(self) -> None:
        """Count the tensors that Python holds now."""
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
                self._add(thing.untyped_storage())

    def retag(self, tensor: torch.Tensor, tag: str) -> None:
        """Count a tensor's storage under another tag from now on."""
        entry, size = self._seen[tensor.untyped_storage()._cdata], self._size(tensor.untyped_storage())
        self.live[entry[1]] -= size
        self.live[tag] += size
        entry[1] = tag

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = self.now, dict(self.live)

    def _size(self, storage) -> int:
        return math.ceil(storage.nbytes() / self.block) * self.block

    def _add(self, storage) -> None:
        key, size = storage._cdata, self._size(storage)
        if key in self._seen:
            return
        self._seen[key] = [weakref.ref(storage, lambda _: self._drop(key, size)), self.tag]
        self.live[self.tag] += size
        self.now += size
        self._raise_peak(0)

    def _drop(self, key: int, size: int) -> None:
        self.live[self._seen.pop(key)[1]] -= size
        self.now -= size

    def _raise_peak(self, extra: int) -> None:
        if self.now + extra > self.peak:
            self.peak, self.at_peak = self.now + extra, {**self.live, "workspace": extra}
