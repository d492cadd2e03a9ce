"""Sees every tensor that a step makes or takes, in forward, recomputation and backward, and every message."""

from __future__ import annotations

import gc
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shardio.load.partition import balanced
from trainer.comm import Comm, Counting
from trainer.graph.graph import Graph

NARROW = 64  # whatever is no node, edge, weight or message is less: batch, time, variables, channels, heads


class Watch(TorchDispatchMode):
    """Attributes.

    sizes: of all dimensions seen that are not narrow, with an example: 560: `aten.mm [560, 32]`.
    messages: names of the collectives, however they were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, str] = {}
        self.messages: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.see((args, kwargs, result), str(function))
        if function.namespace == "c10d":
            self.messages.append(function._opname)
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


class Heard(Counting):
    """A communicator that remembers all it is told to send: (kind, tag, bytes)."""

    def __init__(self, comm: Comm) -> None:
        super().__init__(comm)
        self.heard: list[tuple[str, str, int]] = []

    def all_to_all(self, rows: Tensor, send: Any, receive: Any, tag: str) -> Tensor:
        self.heard.append(("all_to_all", tag, rows.numel() * rows.element_size()))
        return super().all_to_all(rows, send, receive, tag)

    def sum(self, tensor: Tensor, tag: str) -> Tensor:
        self.heard.append(("sum", tag, tensor.numel() * tensor.element_size()))
        return super().sum(tensor, tag)

    def gather(self, thing: Any, tag: str) -> Any:
        self.heard.append(("gather", tag, len(thing) if isinstance(thing, str) else 0))
        return super().gather(thing, tag)


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
