"""Which cells are near which nodes of the hidden mesh, found block by block.

The blocks are the same for every cut. A rank looks at those of its part of the cells, then the ranks tell one another
what they found of every node: what that comes to depends neither on who looked nor on the order of what was found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from shardio.errors import DatasetError
from trainer.graph.grid import Float64, Frames, Int64, Mesh, check_places, dot

BLOCK_CELLS = 2**16

Gather = Callable[[Any], Sequence[Any]]


@dataclass(frozen=True)
class Pairs:
    """Cells and mesh nodes that are near one another, [pairs]."""

    cell: Int64
    node: Int64  # of the whole mesh
    square: Float64  # of the chord between them
    feeds: NDArray[np.bool_]  # within the cut-off, or the node is the cell's nearest


class Near:
    """Finds pairs, the cells in blocks that are the same on all ranks."""

    def __init__(self, latitudes: Float64, longitudes: Float64, mesh: Mesh, cutoff: float) -> None:
        self.latitudes, self.longitudes, self.spacing = latitudes, longitudes, mesh.spacing
        self.nodes = Frames.of(mesh.latitudes, mesh.longitudes)
        self.tree = cKDTree(self.nodes.position)
        self.blocks = range(math.ceil(latitudes.size / BLOCK_CELLS))
        self.cutoff, self.reach = (_chord(factor * mesh.spacing) for factor in (cutoff, max(cutoff, 1.0)))

    def cells(self, block: int) -> Frames:
        """Of one block. Raises: DatasetError if one of them has no place on the globe."""
        cells = slice(block * BLOCK_CELLS, (block + 1) * BLOCK_CELLS)
        latitudes, longitudes = self.latitudes[cells], self.longitudes[cells]
        check_places(latitudes, longitudes, cells.start)
        return Frames.of(latitudes, longitudes)

    def pairs(self, position: Float64, block: int) -> Pairs:
        """Within reach, or of a cell and its nearest node; position [cells of the block, 3]."""
        loose = self.reach * (1.0 + 1e-9)  # the tree proposes; what is within reach is decided below
        found = cKDTree(position).sparse_distance_matrix(self.tree, loose, output_type="ndarray")
        nearest = self.tree.query(position)[1]
        cell = np.concatenate([found["i"], np.arange(len(position))])
        node = np.concatenate([found["j"], nearest])
        chord = position[cell] - self.nodes.position[node]
        square, is_nearest = dot(chord, chord), node == nearest[cell]
        again = np.arange(cell.size) >= len(found)  # the nearest nodes: to be added if they are out of reach
        keep = (square <= self.reach**2) != again
        feeds = (square <= self.cutoff**2) | is_nearest
        return Pairs(cell[keep] + block * BLOCK_CELLS, node[keep], square[keep], feeds[keep])


def _chord(angle: float) -> float:
    return 2.0 * math.sin(min(angle, math.pi) / 2.0)


@dataclass(frozen=True)
class Survey:
    """What cells mean to each node of the mesh, [nodes].

    Attributes:
      nearest: [nodes, 5]: square of the chord, place and number of the nearest cell, by which rivals are ranked: ties
        go by place; infinite if none is near.
      feeding: cells that feed the node by cut-off or as their nearest.
      first, last: blocks with cells near the node.
    """

    nearest: Float64
    feeding: Int64
    first: Int64
    last: Int64

    @property
    def cell(self) -> Int64:
        """[nodes] the nearest cell; -1 if none is near."""
        return np.where(self.last >= 0, self.nearest[:, -1], -1.0).astype(np.int64)


def take_survey(near: Near, rank: int = 0, ranks: int = 1, gather: Gather = lambda found: [found]) -> Survey:
    """Of all cells. The ranks call it together, and each looks at its share of the blocks.

    Raises: DatasetError on all of them if a coordinate is none.
    """
    first, last = (len(near.blocks) * place // ranks for place in (rank, rank + 1))
    found = gather(_look_at(near, range(first, last)))
    for one in found:
        if isinstance(one, Exception):
            raise one
    whole: Survey = found[0]
    for other in found[1:]:
        whole = _join(whole, other)
    return whole


def _look_at(near: Near, blocks: range) -> Survey | DatasetError:
    """Some of the cells; what is wrong with them is told to all ranks, for they wait."""
    nodes = len(near.nodes.position)
    feeding, first, last = np.zeros(nodes, np.int64), np.full(nodes, len(near.blocks)), np.full(nodes, -1)
    nearest = np.full((nodes, 5), np.inf)
    for block in blocks:
        try:
            position = near.cells(block).position
        except DatasetError as error:
            return error
        pairs = near.pairs(position, block)
        feeding += np.bincount(pairs.node[pairs.feeds], minlength=nodes)
        met = np.unique(pairs.node)
        first[met], last[met] = np.minimum(first[met], block), block
        place = position[pairs.cell - block * BLOCK_CELLS]
        rivals = np.concatenate([nearest[met], np.column_stack([pairs.square, place, pairs.cell])])
        nearest[met] = _best(rivals, np.concatenate([met, pairs.node]), met)
    return Survey(nearest, feeding, first, last)


def _best(rivals: Float64, of: Int64, nodes: Int64) -> Float64:
    """[nodes, 5] the first of the rivals of each node, in their order; every one has some."""
    ranking = np.lexsort((*rivals.T[::-1], of))
    counts = np.bincount(np.searchsorted(nodes, of))
    best: Float64 = rivals[ranking[np.cumsum(counts) - counts]]
    return best


def _join(one: Survey, other: Survey) -> Survey:
    nodes = np.arange(len(one.nearest))
    nearest = _best(np.concatenate([one.nearest, other.nearest]), np.tile(nodes, 2), nodes)
    first, last = np.minimum(one.first, other.first), np.maximum(one.last, other.last)
    return Survey(nearest, one.feeding + other.feeding, first, last)
