"""Bytes of all tensors that live, and what they are for: seen where tensors are made, in forward and backward.

    live = LiveBytes()
    live.hold("weights", model)                 what was there before
    with live:
        with live.labelled("encoder"):
            ...                                 what is made in here is the encoder's, for as long as it lives
    live.peak, live.at_peak["encoder"]

A storage counts once, however many tensors view it, until the last of them is gone. It works on real tensors and on
fake ones (FakeTensorMode) alike: the same operations make the same tensors. What an operation takes and gives back
while it runs is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OTHER = "other"


class LiveBytes(TorchDispatchMode):
    """Counts while entered; what is freed later is still taken off.

    Attributes:
      now: bytes that live, by label.
      peak: the most that lived at once.
      at_peak: what they were for.
      made: storages counted so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.peak = self.total = self.made = 0
        self._label = OTHER
        self._seen: dict[int, _Storage] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._add(result, self._label)
        elif isinstance(result, list | tuple):
            for one in result:
                if isinstance(one, Tensor):
                    self._add(one, self._label)
        return result

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """What is made within is for that."""
        before, self._label = self._label, label
        try:
            yield
        finally:
            self._label = before

    @property
    def label(self) -> str:
        """For what tensors are made just now."""
        return self._label

    def hold(self, label: str, *things: Any) -> None:
        """Count all tensors in these things: from now on, or as this if they are counted already."""
        for tensor in tensors_in(things):
            self._add(tensor, label)
            storage = self._seen[id(tensor.untyped_storage())]
            self.now[storage.label] -= storage.nbytes
            self.now[label] += storage.nbytes
            storage.label = label

    def forget_peak(self) -> None:
        """Begin anew from what lives now."""
        self.peak, self.at_peak = self.total, self.now.copy()

    def _add(self, tensor: Tensor, label: str) -> None:
        storage = tensor.untyped_storage()  # one Python object for as long as the storage lives
        key = id(storage)
        if key in self._seen:
            return
        self._seen[key] = _Storage(storage.nbytes(), label, weakref.ref(storage, lambda _: self._gone(key)))
        self.now[label] += storage.nbytes()
        self.total += storage.nbytes()
        self.made += 1
        if self.total > self.peak:
            self.forget_peak()

    def _gone(self, key: int) -> None:
        storage = self._seen.pop(key)
        self.now[storage.label] -= storage.nbytes
        self.total -= storage.nbytes


class _Storage:
    __slots__ = ("label", "nbytes", "reference")

    def __init__(self, nbytes: int, label: str, reference: weakref.ref[Any]) -> None:
        self.nbytes, self.label, self.reference = nbytes, label, reference


def tensors_in(thing: Any) -> Iterator[Tensor]:
    """All tensors in lists, tuples, dictionaries, dataclasses, modules and optimizers."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, torch.nn.Module):
        yield from (*thing.parameters(), *thing.buffers())
    elif isinstance(thing, torch.optim.Optimizer):
        yield from tensors_in(dict(thing.state))
    elif isinstance(thing, dict):
        yield from tensors_in(list(thing.values()))
    elif isinstance(thing, list | tuple):
        for one in thing:
            yield from tensors_in(one)
    elif is_dataclass(thing):
        yield from tensors_in([getattr(thing, field.name) for field in fields(thing)])
