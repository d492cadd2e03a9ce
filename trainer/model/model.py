"""The forecast model: cells to hidden mesh, steps on the mesh, back to the cells; every rank has its own nodes only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shardio.errors import PlanError
from trainer.graph.halo import exchange
from trainer.graph.sharded_graph import NODE_FEATURES, ShardedGraph
from trainer.model.kernel import AUTO, check_kernel
from trainer.model.layers import Block, maybe_checkpoint, take
from trainer.model.processor import PROCESSORS
from trainer.model.processors.layers import Layers


@dataclass(frozen=True)
class ModelOptions:
    """The size of the model, and how it saves memory.

    Attributes:
      channels: width of all latent rows.
      num_layers: blocks of the processor.
      num_heads: attention heads; divides channels.
      mlp_ratio: width of the inner layer of perceptrons, in channels.
      num_chunks: encoder and decoder compute their destinations in so many parts, one after the other.
      checkpointing: compute activations again in backward instead of keeping them.
      shard_strategy: of the processor: edges (halo exchange) or heads (all-to-all over attention heads).
      kernel: of attention: auto, cpp (for CPUs, compiled when first used) or torch.
    """

    channels: int = 128
    num_layers: int = 8
    num_heads: int = 8
    mlp_ratio: int = 4
    num_chunks: int = 1
    checkpointing: bool = False
    shard_strategy: str = "edges"
    kernel: str = AUTO

    def __post_init__(self) -> None:
        for name in ("channels", "num_layers", "num_heads", "mlp_ratio", "num_chunks"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}. Use 1 or more.")
        check_kernel(self.kernel)
        if self.shard_strategy not in PROCESSORS:
            known = ", ".join(PROCESSORS)
            raise PlanError(f"shard_strategy {self.shard_strategy!r} is unknown. Use one of: {known}.")
        if self.channels % self.num_heads:
            heads = [n for n in range(1, self.channels + 1) if self.channels % n == 0 and n <= 64]
            raise PlanError(
                f"{self.channels} channels cannot be cut into {self.num_heads} heads. Use num_heads of: "
                f"{', '.join(map(str, heads))}."
            )


class EncodeProcessDecode(nn.Module):
    """Encoder, processor and decoder, all of graph-transformer blocks.

    Args:
      options: sizes.
      inputs: channels of the input, all input times and variables.
      outputs: channels of the output.
      graph: this rank's part.
    """

    def __init__(self, options: ModelOptions, inputs: int, outputs: int, graph: ShardedGraph):
        super().__init__()
        self.options, self.graph = options, graph
        channels = options.channels
        block = (channels, options.num_heads, options.mlp_ratio)
        self.embed_cells = nn.Linear(inputs + NODE_FEATURES, channels)
        self.embed_hidden = nn.Linear(NODE_FEATURES, channels)
        self.encoder = Block(*block)
        layers = Layers(options.num_layers, lambda: Block(*block, one_node_set=True), options.checkpointing)
        self.processor = PROCESSORS[options.shard_strategy].build(layers)
        self.embed_targets = nn.Linear(inputs + NODE_FEATURES, channels)
        self.decoder = Block(*block)
        self.output = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, outputs))

    def forward(self, fields: Tensor) -> Tensor:
        """One step.

        Args: fields: [batch, cells/M, inputs].
        Returns: [batch, cells/M, outputs].
        """
        hidden = self._encode(fields)  # [batch, hidden/M, channels]
        processed = self._process(hidden)  # [batch, hidden/M, channels]
        return self._decode(hidden + processed, fields)  # [batch, cells/M, outputs]

    def _encode(self, fields: Tensor) -> Tensor:
        """Pull what is fewer bytes, raw inputs or embedded rows; then update the hidden nodes chunk by chunk."""
        links, places = self.graph.encoder, self.graph.cells.to(fields.dtype)
        pull_raw = fields.shape[-1] <= self.options.channels
        if pull_raw:
            fields = exchange(fields, links.halo)  # [batch, cells/M + halo, inputs]
            rows = torch.cat([fields, places.expand(fields.shape[0], -1, -1)], dim=-1)
        else:
            owned = places[: links.halo.owned].expand(fields.shape[0], -1, -1)
            rows = exchange(self.embed_cells(torch.cat([fields, owned], dim=-1)), links.halo)
        start = self.graph.hidden.to(fields.dtype).expand(fields.shape[0], -1, -1)

        def update(source: Tensor, start: Tensor, chunk):  # type: ignore[no-untyped-def]
            source = self.embed_cells(source) if pull_raw else source
            return self.encoder(source, self.embed_hidden(start), chunk)

        parts = [
            maybe_checkpoint(
                self.options.checkpointing, update, take(rows, chunk.sources), start[:, chunk.destinations], chunk
            )
            for chunk in links.chunks
        ]
        return torch.cat(parts, dim=1)

    def _process(self, hidden: Tensor) -> Tensor:
        processed: Tensor = self.processor(hidden, self.graph.processor)
        return processed

    def _decode(self, hidden: Tensor, fields: Tensor) -> Tensor:
        links = self.graph.decoder
        rows = exchange(hidden, links.halo)  # [batch, hidden/M + halo, channels]
        places = self.graph.cells[: self.graph.owned_cells].to(fields.dtype)
        targets = torch.cat([fields, places.expand(fields.shape[0], -1, -1)], dim=-1)

        def update(source: Tensor, target: Tensor, chunk):  # type: ignore[no-untyped-def]
            return self.output(self.decoder(source, self.embed_targets(target), chunk))

        parts = [
            maybe_checkpoint(
                self.options.checkpointing, update, take(rows, chunk.sources), targets[:, chunk.destinations], chunk
            )
            for chunk in links.chunks
        ]
        return torch.cat(parts, dim=1)
