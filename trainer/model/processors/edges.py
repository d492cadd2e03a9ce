"""The graph transformer cut by edges: a rank attends along those that end at its nodes, and borrows their sources."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.graph.counts import RankCounts
from trainer.graph.halo import fetch
from trainer.graph.pretend import Pretence
from trainer.graph.sharded_graph import Links
from trainer.model.layers import maybe_checkpoint
from trainer.model.processors.layers import BlockList


class EdgesProcessor(BlockList):
    """All layers, one after the other."""

    def forward(self, hidden: Tensor, links: Links) -> Tensor:
        """[batch, hidden/M, channels], of all layers one after the other."""
        for block in self:
            hidden = self._update(block, hidden, links)
        return hidden

    def _update(self, block: nn.Module, owned: Tensor, links: Links) -> Tensor:
        """The halo is fetched outside of what is computed again: nothing is sent twice."""
        (chunk,) = links.chunks
        exchanges = links.halo.ranks > 1  # alike on all ranks: one that borrows nothing joins the messages too

        def update(owned: Tensor, halo: Tensor) -> Tensor:
            source = torch.cat([owned, halo], dim=1) if exchanges else owned
            updated: Tensor = block(source, owned, chunk)
            return updated

        halo = fetch(owned, links.halo) if exchanges else owned[:, :0]
        updated: Tensor = maybe_checkpoint(self.checkpointing, update, owned, halo)
        return updated


def pretend_links(counts: RankCounts, pretence: Pretence) -> Links:
    """As link_processor makes them."""
    return pretence.links("processor", counts.processor, 1)
