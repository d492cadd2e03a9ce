"""Sees every tensor that a step makes or takes, in forward, recomputation and backward, and every message."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import FunctionType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardio.load.partition import balanced
from trainer.graph.graph import Graph

NARROW = 64  # whatever is no node, edge, weight or message is less: batch, time, variables, channels, heads
KINDS = ("all_", "reduce", "gather", "scatter", "broadcast", "send", "recv", "isend", "irecv", "batch_isend")
COLLECTIVES = [name for name in dir(dist) if name.startswith(KINDS) and type(getattr(dist, name)) is FunctionType]


class Watch(TorchDispatchMode):
    """Attributes.

    sizes: of all dimensions seen that are not narrow, with an example: 560: `aten.mm [560, 32]`.
    messages: names of the collectives called.
    dispatched: operations of process groups, however they were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, str] = {}
        self.messages: list[str] = []
        self.dispatched = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.see((args, kwargs, result), str(function))
        self.dispatched += str(function).startswith("c10d.")
        return result

    def see(self, found: Any, where: str) -> None:
        """Every tensor in nested lists, tuples and dictionaries."""
        if isinstance(found, Tensor):
            for size in found.shape:
                if size >= NARROW:
                    self.sizes.setdefault(size, f"{where} {list(found.shape)}")
        elif isinstance(found, dict):
            self.see(list(found.values()), where)
        elif isinstance(found, list | tuple):
            for one in found:
                self.see(one, where)

    def see_living(self, but: set[int], when: str) -> None:
        """All tensors that there are, also those that other threads made; `but` those of these ids."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # isinstance wakes deprecated properties of some modules
            living = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
        for tensor in living:
            if id(tensor) not in but:
                self.see(tensor.detach(), f"alive {when}")

    @contextmanager
    def collectives(self) -> Iterator[None]:
        """Every message of torch.distributed passes here first."""
        kept = {name: getattr(dist, name) for name in COLLECTIVES}

        def seen(name: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.messages.append(name)
                self.see((args, kwargs), name)
                return kept[name](*args, **kwargs)

            return call

        for name in kept:
            setattr(dist, name, seen(name))
        try:
            yield
        finally:
            for name, function in kept.items():
                setattr(dist, name, function)


def living_ids() -> set[int]:
    """Of all tensors that there are."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {id(thing) for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)}


def rows_allowed(graphs: list[Graph], rank: int, num_chunks: int) -> dict[int, str]:
    """Sizes that node and edge dimensions of a rank may have: owned, halo, both, lent rows, and those of chunks.

    They follow from edges and bounds alone, not from what the trainer made of them.
    """
    sizes: dict[int, str] = {}
    mine = graphs[rank]
    for part, chunks in (("encoder", num_chunks), ("processor", 1), ("decoder", num_chunks)):
        bounds = mine.cells.bounds if part == "encoder" else mine.hidden_bounds
        needed = [np.unique(getattr(graph, part).source) for graph in graphs]
        first, last = bounds[rank : rank + 2]
        lent = [int(((ids >= first) & (ids < last)).sum()) for other, ids in enumerate(needed) if other != rank]
        owner = np.searchsorted(bounds, needed[rank], side="right") - 1
        borrowed = np.bincount(owner, minlength=len(graphs))
        halo = int(borrowed.sum() - borrowed[rank])
        edges = getattr(mine, part)
        named = {"owned": last - first, "halo": halo, "rows": last - first + halo, "lent": sum(lent)}
        named |= {"edges": edges.source.size, "destinations": edges.destinations}
        ends = balanced(edges.destinations, min(chunks, edges.destinations))
        for start, stop in pairwise(ends):
            chosen = (edges.destination >= start) & (edges.destination < stop)
            key = f"chunk {start} to {stop}: "
            named |= {f"{key}destinations": stop - start, f"{key}edges": int(chosen.sum())}
            named |= {f"{key}sources": np.unique(edges.source[chosen]).size}
        pairs = [*enumerate(lent), *((f"from {other}", int(rows)) for other, rows in enumerate(borrowed))]
        for name, size in [*named.items(), *pairs]:
            sizes[int(size)] = f"{part} {name}"
    return sizes
