"""Counting the bytes that tensors hold while real code runs, on tensors with or without data.

Under torch's FakeTensorMode every operator returns tensors of the right shape and dtype and computes nothing.
Running the real model, loss, backward pass and optimizer on such tensors, and counting their storages, tells
what a step will hold: for any architecture, in seconds, without weights.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora.hardware import restart_cuda_peak


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive, by the `tag` under which they were made, and their peak.

    A storage counts once, however many views look at it, from the operator that returns it until it is freed.
    `block`: sizes are rounded up to it (the CUDA caching allocator hands out multiples of 512 bytes).
    `workspace(operator, args, out)`: bytes that a kernel allocates inside, which no dispatch mode can see.
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
                self.add(leaf)
        if self.workspace and (extra := self.workspace(function, args, out)):
            self._raise_peak(extra)
        return out

    def count_existing(self) -> None:
        """Count the tensors that Python holds now."""
        for thing in gc.get_objects():
            if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
                self.add(thing)

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now on, unless it is counted already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, self._size(storage)
        if key in self._seen:
            return
        self._seen[key] = [weakref.ref(storage, lambda _: self._drop(key, size)), self.tag]
        self.live[self.tag] += size
        self.now += size
        self._raise_peak(0)

    def retag(self, tensor: torch.Tensor, tag: str) -> None:
        """Count a tensor's storage under another tag from now on."""
        storage = tensor.untyped_storage()
        entry, size = self._seen[storage._cdata], self._size(storage)
        self.live[entry[1]] -= size
        self.live[tag] += size
        entry[1] = tag

    def start_peak(self) -> None:
        """Forget the peak so far."""
        self.peak, self.at_peak = self.now, dict(self.live)

    def _size(self, storage) -> int:
        return math.ceil(storage.nbytes() / self.block) * self.block

    def _drop(self, key: int, size: int) -> None:
        self.live[self._seen.pop(key)[1]] -= size
        self.now -= size

    def _raise_peak(self, extra: int) -> None:
        if self.now + extra > self.peak:
            self.peak, self.at_peak = self.now + extra, {**self.live, "workspace": extra}


class StepPeak:
    """The most bytes that tensors held at once in any training step so far: `bytes`.

    On a GPU torch's allocator knows it. On a CPU LiveBytes counts. That is slow, so only steps that are wider
    than any counted before are counted.
    """

    def __init__(self, device: str):
        self.device = device
        self.bytes = 0
        self._widest = 0

    @contextmanager
    def watch(self, width: int, steady: bool) -> Iterator[None]:
        """Around one step on rows of `width` tokens; `steady`: the optimizer has its state already.

        The first step has none yet, so after it the next one is counted too, whatever its width.
        """
        if self.device == "cuda":
            if not self._widest:  # what loading and scoring took before is no training step's
                restart_cuda_peak()
                self._widest = width
            yield
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated())
        elif width <= self._widest:
            yield
        else:
            self._widest = width if steady else 0
            live = LiveBytes()
            gc.collect()  # what nobody can reach any more is not the step's
            live.count_existing()
            with live:
                yield
            self.bytes = max(self.bytes, live.peak)
