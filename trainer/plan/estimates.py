"""Counts of one rank's part of a graph that is too large to be built whole: see graph_counts.py.

A halo has a width, that of what its edges reach over, and a length, that of the rank's border. With N nodes on the
sphere, cut into M shares, a width of c mean spacings (sqrt(4 pi / N)) makes:

  bands          all round the globe on two sides, at most     3.55 c sqrt(N)         whatever M
  compact cells  round about                                   3.72 c sqrt(N / M)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from shardio import Partition, balanced
from trainer.graph.counts import EvenEnds, ListedEnds, PartCounts, RankCounts, local_rows, part_counts
from trainer.graph.graph import DECODER_NEIGHBOURS, GraphOptions
from trainer.graph.grid import Float64, Frames, Int64, build_mesh

BANDS, COMPACT = math.sqrt(4.0 * math.pi), 3.72
# How far edges reach beyond the border of a share, in spacings of the nodes at which they start: as counted on
# octahedral grids of o96 and o160. How rows happen to lie to the border moves encoder and decoder by half of it.
KNN_REACH = 0.385  # times the square root of the neighbours
MESH_REACH = {"mesh": 0.8, "multiscale": 1.35}
DECODER_REACH = 1.0
ENCODER_SLACK = 0.25  # of a cell; besides, hidden nodes at all distances from the border reach the cut-off
MESH_DEGREE = 6
GLOBAL = 170.0  # degrees of latitude


# ------------------------------------------------------------------------------------------ the part of one rank, built
def rank_counts(
    latitudes: Float64, longitudes: Float64, cells: Partition, rank: int, options: GraphOptions
) -> RankCounts:
    """What `rank` has of the graph, from its cells and those around them."""
    mesh, own = build_mesh(options.hidden), cells.cells(rank)
    margin = math.degrees(3.0 * max(options.cutoff, 1.0) * mesh.spacing)
    south, north = latitudes[own].min() - margin, latitudes[own].max() + margin
    near_cells = np.flatnonzero((latitudes >= south) & (latitudes <= north))
    near_nodes = np.flatnonzero((mesh.latitudes >= south) & (mesh.latitudes <= north))
    position = _positions(latitudes[near_cells], longitudes[near_cells])
    nodes = _positions(mesh.latitudes[near_nodes], mesh.longitudes[near_nodes])
    tree = cKDTree(nodes)
    most = max(DECODER_NEIGHBOURS, math.ceil(2.0 * math.pi * options.cutoff**2) + 2)
    distance, found = tree.query(position, k=np.arange(1, min(most, len(nodes)) + 1))
    feeds = distance <= 2.0 * math.sin(options.cutoff * mesh.spacing / 2.0)
    feeds[:, 0] = True
    cell, place = np.nonzero(feeds)
    node = found[cell, place]
    nearest = _nearest(node, cell, distance[cell, place], len(nodes))
    kept = np.flatnonzero(nearest >= 0)
    order = kept[np.argsort(nearest[kept], kind="stable")]  # as build_graph numbers hidden nodes
    number = np.full(len(nodes), -1)
    number[order] = np.arange(order.size)
    hidden_bounds = np.searchsorted(near_cells[nearest[order]], cells.bounds)
    if np.ptp(latitudes) > GLOBAL:
        hidden_bounds = _of_equal_work(hidden_bounds, rank, mesh.latitudes.size // cells.ranks)
    places = near_cells[cell]
    encoder = _part((places, number[node]), cells.bounds, hidden_bounds, rank)
    first_three = found[:, :DECODER_NEIGHBOURS]
    ends = np.repeat(near_cells, first_three.shape[1])
    decoder = _part((number[first_three.ravel()], ends), hidden_bounds, cells.bounds, rank)
    source, destination = _processor(nodes[order], near_nodes[order], options)
    processor = _part((source, destination), hidden_bounds, hidden_bounds, rank)
    hidden = mesh.latitudes.size
    every = EvenEnds(_processor_edges(hidden, options), hidden, hidden, 0)
    cut = _whole_bounds(hidden_bounds, rank, cells.ranks, hidden)
    processor, decoder = (replace(part, bounds=cut) for part in (processor, decoder))
    return RankCounts("rank", rank, cells, cut, encoder, processor, decoder, every)


def _positions(latitudes: Float64, longitudes: Float64) -> Float64:
    return Frames.of(latitudes, longitudes).position


def _nearest(node: Int64, cell: Int64, distance: Float64, nodes: int) -> Int64:
    """[nodes] the cell nearest to each; -1 if there is none."""
    order = np.lexsort((cell, distance, node))
    node, first = np.unique(node[order], return_index=True)
    nearest = np.full(nodes, -1)
    nearest[node] = cell[order[first]]
    return nearest


def _processor(position: Float64, name: Int64, options: GraphOptions) -> tuple[Int64, Int64]:
    if options.processor == "knn":
        neighbours = np.arange(2, min(options.neighbours, len(position) - 1) + 2)
        source = cKDTree(position).query(position, k=neighbours)[1]
        return source.ravel(), np.repeat(np.arange(len(position)), neighbours.size)
    mesh = build_mesh(options.hidden)
    number = np.full(mesh.latitudes.size, -1)
    number[name] = np.arange(name.size)
    levels = mesh.levels if options.processor == "multiscale" else mesh.levels[-1:]
    source, destination = number[np.concatenate(levels, axis=1)]
    kept = (source >= 0) & (destination >= 0)
    return source[kept], destination[kept]


def _part(
    edges: tuple[Int64, Int64], starts: tuple[int, ...] | Int64, ends: tuple[int, ...] | Int64, rank: int
) -> PartCounts:
    """Edges of the rank, and who lends whom: as graph_counts.CutGraph tells of the whole graph."""
    source, destination = edges
    user, owner = (
        np.searchsorted(bounds, ids, side="right") - 1 for bounds, ids in ((ends, destination), (starts, source))
    )
    ranks, owned = len(starts) - 1, slice(int(starts[rank]), int(starts[rank + 1]))
    mine = np.flatnonzero(user == rank)
    mine = mine[np.argsort(destination[mine], kind="stable")]
    borrowed = _distinct(source[mine], owner[mine], rank, ranks)
    theirs = np.flatnonzero((owner == rank) & (user != rank))
    width = int(source.max()) + 1
    pairs = np.unique(user[theirs] * width + source[theirs])
    lent = np.bincount(pairs // width, minlength=ranks)[:ranks]
    listed = ListedEnds(
        local_rows(source[mine], owned), destination[mine] - int(ends[rank]), 0, int(ends[rank + 1] - ends[rank])
    )
    return part_counts(listed, tuple(int(bound) for bound in starts), lent, borrowed, owned)


def _distinct(source: Int64, owner: Int64, rank: int, ranks: int) -> Int64:
    """[ranks], different nodes of every other rank."""
    remote, first = np.unique(source[owner != rank], return_index=True)
    return np.bincount(owner[owner != rank][first], minlength=ranks)[:ranks] if remote.size else np.zeros(ranks, int)


def _of_equal_work(bounds: Int64, rank: int, nodes: int) -> Int64:
    """With so many nodes for the rank, about the middle of those nearest to its cells; the others give way."""
    more = nodes - (bounds[rank + 1] - bounds[rank])
    moved = np.where(np.arange(bounds.size) > rank, bounds + more - more // 2, bounds - more // 2)
    clipped: Int64 = np.clip(moved, 0, bounds[-1])
    return clipped


def _whole_bounds(near: NDArray[np.int64], rank: int, ranks: int, hidden: int) -> tuple[int, ...]:
    """Bounds of all hidden nodes, with the rank's own number of them: what is far away was not counted."""
    own = int(near[rank + 1] - near[rank])
    others = balanced(hidden - own, ranks - 1) if ranks > 1 else (0,)
    return (*others[: rank + 1], *(bound + own for bound in others[rank:]))


# ------------------------------------------------------------------------------------------------------------- formulas
@dataclass(frozen=True)
class Densities:
    """What a share of a global, quasi-uniform grid has. Attributes: cells and hidden nodes of the globe; the graph."""

    cells: int
    hidden: int
    options: GraphOptions

    @property
    def spread(self) -> float:
        """Width of what hidden nodes reach of the cells around them, in spacings of cells."""
        return 0.5 * self.options.cutoff**2 * math.sqrt(self.cells / self.hidden) + ENCODER_SLACK

    @property
    def processor_reach(self) -> float:
        """In spacings of hidden nodes. Coarse edges of a multiscale mesh are longer, but start at fewer nodes."""
        if self.options.processor == "knn":
            return KNN_REACH * math.sqrt(self.options.neighbours)
        return MESH_REACH[self.options.processor]

    def halos(self, ranks: int, compact: bool) -> dict[str, int]:
        """Rows that a rank borrows, of at most all others."""
        found = {}
        for part, nodes, width in (
            ("encoder", self.cells, self.spread),
            ("processor", self.hidden, self.processor_reach),
            ("decoder", self.hidden, DECODER_REACH),
        ):
            length = COMPACT * math.sqrt(nodes / ranks) if compact else BANDS * math.sqrt(nodes)
            found[part] = round(min(width * length, nodes - nodes / ranks))
        return found


def estimated_counts(cells: Partition, rank: int, options: GraphOptions) -> RankCounts:
    """By formulas, for bands of latitude."""
    mesh = build_mesh(options.hidden) if options.hidden.startswith("o") else None
    hidden = mesh.latitudes.size if mesh else 10 * 4 ** int(options.hidden[3:]) + 2
    bounds, whole = balanced(hidden, cells.ranks), Densities(cells.bounds[-1], hidden, options)
    own_cells, own_hidden = cells.sizes[rank], bounds[rank + 1] - bounds[rank]
    halos, borders = whole.halos(cells.ranks, compact=False), whole.halos(10**9, compact=False)
    per_node = cells.bounds[-1] / hidden
    feeding = max(math.pi * options.cutoff**2, 1.0) * per_node
    edges = {
        "encoder": round(own_hidden * feeding),
        "processor": _processor_edges(own_hidden, options),
        "decoder": own_cells * DECODER_NEIGHBOURS,
    }
    own = {"encoder": own_cells, "processor": own_hidden, "decoder": own_hidden}
    to = {"encoder": own_hidden, "processor": own_hidden, "decoder": own_cells}
    parts = []
    for part, count in edges.items():
        ends = EvenEnds(count, own[part] + halos[part], to[part], borders[part])
        rows = _neighbours(halos[part], rank, cells.ranks)
        parts.append(PartCounts(cells.bounds if part == "encoder" else bounds, rows, rows, to[part], ends))
    every = EvenEnds(_processor_edges(hidden, options), hidden, hidden, 0)
    encoder, processor, decoder = parts
    return RankCounts("formulas", rank, cells, bounds, encoder, processor, decoder, every)


def _processor_edges(nodes: int, options: GraphOptions) -> int:
    if options.processor == "knn":
        return nodes * options.neighbours
    return nodes * MESH_DEGREE * 4 // 3 if options.processor == "multiscale" else nodes * MESH_DEGREE


def _neighbours(rows: int, rank: int, ranks: int) -> tuple[int, ...]:
    """Half of the rows from each of the two neighbours."""
    sides = [other for other in (rank - 1, rank + 1) if 0 <= other < ranks]
    shares = dict(zip(sides, np.diff(balanced(rows, max(1, len(sides)))).tolist(), strict=False))
    return tuple(shares.get(other, 0) for other in range(ranks))
