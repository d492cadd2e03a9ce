"""Which processors there are, and what each brings along: its part of the graph, its layers, its plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.comm import Comm
from trainer.graph.counts import RankCounts
from trainer.graph.graph import Graph
from trainer.graph.pretend import Pretence
from trainer.graph.sharded_graph import Placement, link_processor
from trainer.model.processors.edges import EdgesProcessor, pretend_links
from trainer.model.processors.heads import HeadsProcessor, check_heads, link_heads, pretend_heads
from trainer.model.processors.layers import Layers


@dataclass(frozen=True)
class Kind:
    """A processor that options can name.

    Attributes:
      prepare: what a rank computes on, of its graph; all ranks of the group call it together.
      build: the network, called with [batch, hidden/M, channels] and what was prepared.
      pretend: what would be prepared, as tensors without numbers, of counts.
      check: of attention heads and ranks, raises what does not fit before any rank is started.
    """

    prepare: Callable[[Graph, Comm, Placement], Any]
    build: Callable[[Layers], nn.Module]
    pretend: Callable[[RankCounts, Pretence], Any]
    check: Callable[[int, int], None] = lambda heads, ranks: None


PROCESSORS = {
    "edges": Kind(link_processor, EdgesProcessor, pretend_links),
    "heads": Kind(link_heads, HeadsProcessor, pretend_heads, check_heads),
}
