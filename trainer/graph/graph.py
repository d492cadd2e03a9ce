"""The graph, cut by destination: encoder (cells to hidden), processor (hidden to hidden), decoder (hidden to cells).

    dataset's cells     0 ........ 4 ........ 8          cut by the loader's partition
    hidden nodes           0 ... 1 ... 2 ... 3           numbered by their nearest cell, cut into equal work

A rank owns the edges that end at its nodes. Sources are global ids: those of other ranks are the halo (halo.py).

Nothing but the two cuts depends on the number of ranks, bit for bit. To that end all cells are taken in the same
blocks, each by one rank (survey.py), distances are compared as computed here, and every rank asks the same KD-tree.
Nor does the order of the cells in the dataset decide which edges there are: of equally near nodes or cells, the mesh
and the places decide, never a number that follows that order.
While it builds, a rank holds the hidden mesh and its processor edges whole, but the cells one block at a time.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from shardio import Partition
from shardio.errors import PlanError, TopologyError
from trainer.graph import graph_cache
from trainer.graph.graph_cache import Arrays, cache_path
from trainer.graph.grid import Float64, Int32, Int64, Mesh, build_mesh, mesh_nodes
from trainer.graph.survey import BLOCK_CELLS, Gather, Near, Survey, take_survey

DECODER_NEIGHBOURS = 3
PROCESSORS = ("knn", "mesh", "multiscale")
PARTS = ("encoder", "processor", "decoder")


@dataclass(frozen=True)
class GraphOptions:
    """What graph to build.

    Attributes:
      hidden: hidden mesh: oN (octahedral) or icoR (icosahedron, refined R times).
      cutoff: a cell feeds the hidden nodes within this distance, in mean hidden spacings (sqrt(4 pi / nodes)).
      processor: edges between hidden nodes: knn (each node's nearest), or, of icoR, mesh (sides of its
        triangles) or multiscale (sides of the triangles of all refinements).
      neighbours: edges that end at each hidden node, with knn.
      processor_layers: how often processor edges are used for one use of encoder edges, to weigh a rank's work; the
        trainer puts num_layers here.
    """

    hidden: str = "ico4"
    cutoff: float = 0.7
    processor: str = "knn"
    neighbours: int = 8
    processor_layers: int = 1

    def __post_init__(self) -> None:
        if self.processor not in PROCESSORS:
            raise PlanError(f"processor edges {self.processor!r} are unknown. Use one of: {', '.join(PROCESSORS)}.")
        if self.processor != "knn" and not self.hidden.startswith("ico"):
            raise PlanError(
                f"hidden mesh {self.hidden} has no {self.processor} edges, only icosahedra have. Use processor knn, "
                "or a hidden mesh such as ico5."
            )
        for name, least in (("cutoff", 0), ("neighbours", 1), ("processor_layers", 0)):
            if not least <= getattr(self, name) < math.inf:
                raise PlanError(f"{name} is {getattr(self, name)}. Use {least} or more.")


@dataclass(frozen=True, eq=False)
class Edges:
    """The edges that end at the nodes of one rank, sorted by destination, then source.

    Attributes:
      source: int32 [edges/M], global id.
      destination: int32 [edges/M], counted from the first node the rank owns.
      features: float32 [edges/M, 3]: length of the chord from destination to source, and how far that goes east
        and north in the destination's own frame; over the mean hidden spacing, or for the processor the root mean
        square length of all its edges.
      destinations: nodes that the rank owns.
    """

    source: Int32
    destination: Int32
    features: NDArray[np.float32]
    destinations: int

    @property
    def offsets(self) -> Int64:
        """[destinations + 1]: the edges of destination i are offsets[i] to offsets[i + 1]."""
        return np.searchsorted(self.destination, np.arange(self.destinations + 1))


@dataclass(frozen=True, eq=False)
class Graph:
    """What one rank owns of the graph.

    Attributes:
      rank: whose part this is.
      cells: the cut of the cells.
      hidden_bounds: [ranks + 1], first hidden node of every rank, then the number of hidden nodes.
      cell_coordinates: [cells/M, 2] latitude and longitude, degrees.
      hidden_coordinates: [hidden/M, 2] likewise.
      encoder: cells to hidden. processor: hidden to hidden. decoder: hidden to cells.
    """

    rank: int
    cells: Partition
    hidden_bounds: tuple[int, ...]
    cell_coordinates: Float64
    hidden_coordinates: Float64
    encoder: Edges
    processor: Edges
    decoder: Edges

    @property
    def hidden(self) -> slice:
        """The hidden nodes that this rank owns."""
        return slice(self.hidden_bounds[self.rank], self.hidden_bounds[self.rank + 1])


def build_graph(
    latitudes: Float64,
    longitudes: Float64,
    cells: Partition,
    rank: int,
    options: GraphOptions | None = None,
    cache: str | os.PathLike[str] | None = None,
    gather: Gather | None = None,
) -> Graph:
    """What `rank` owns of the graph; put together over the ranks it is the one-rank graph, bit for bit.

    Every cell feeds its nearest hidden node at least, every hidden node is fed by its nearest cell at least. Hidden
    nodes that are further than one mean spacing (and the cut-off) from all cells are left out: of a limited area
    only the mesh near it is kept. A rank's work, its encoder edges plus processor_layers times its processor edges,
    is at most the mean plus the work of one hidden node.

    Args:
      latitudes, longitudes: [cells], degrees, of the whole grid, in the dataset's order; may be memory maps.
      cells: the cut of the cells over the ranks.
      rank: in the model group.
      options: default GraphOptions().
      cache: folder in which what was built is kept, under a name made of all inputs.
      gather: what every rank says to all others of the model group, as all_gather_object; then all of them call this
        together, and each looks at its part of the cells only. None: this rank looks at all cells itself.
    Raises: DatasetError if a coordinate is not one; PlanError if the hidden mesh is unknown or finer than the grid, or
      the partition is of another grid; TopologyError if there are more ranks than hidden nodes, or no such rank;
      OutputError if the cache cannot be written.
    """
    options = options or GraphOptions()
    if cells.bounds[-1] != latitudes.size:
        raise PlanError(f"the partition is of {cells.bounds[-1]} cells, the grid has {latitudes.size}. Cut this grid.")
    if not 0 <= rank < cells.ranks:
        raise TopologyError(f"rank {rank} is not in a model group of {cells.ranks}. Ranks count from 0.")
    if cache is None:
        return _build(latitudes, longitudes, cells, rank, options, gather)
    path = cache_path(Path(cache), (latitudes, longitudes), (cells, rank, options))
    kept = graph_cache.load(path, [*_OWN, *(f"{part}_{name}" for part in PARTS for name in _OF_EDGES)])
    if kept is not None and (gather is None or all(gather(True))):
        return _from_arrays(kept, cells, rank)
    if kept is None and gather is not None:
        gather(False)
    graph = _build(latitudes, longitudes, cells, rank, options, gather)
    graph_cache.save(path, _as_arrays(graph))
    return graph


_OWN = ("hidden_bounds", "cell_coordinates", "hidden_coordinates")
_OF_EDGES = ("source", "destination", "features", "destinations")


def _as_arrays(graph: Graph) -> Arrays:
    edges = {f"{part}_{name}": getattr(getattr(graph, part), name) for part in PARTS for name in _OF_EDGES}
    return {name: np.asarray(getattr(graph, name)) for name in _OWN} | edges


def _from_arrays(arrays: Arrays, cells: Partition, rank: int) -> Graph:
    bounds, *places = (arrays[name] for name in _OWN)
    parts = ([arrays[f"{part}_{name}"] for name in _OF_EDGES] for part in PARTS)
    edges = [Edges(source, destination, features, int(count)) for source, destination, features, count in parts]
    return Graph(rank, cells, tuple(bounds.tolist()), *places, *edges)  # type: ignore[arg-type]


def _build(
    latitudes: Float64,
    longitudes: Float64,
    cells: Partition,
    rank: int,
    options: GraphOptions,
    gather: Gather | None,
) -> Graph:
    mesh = build_mesh(options.hidden)
    near = Near(latitudes, longitudes, mesh, options.cutoff)
    survey = take_survey(near, rank, cells.ranks, gather) if gather else take_survey(near)
    kept = np.flatnonzero(survey.cell >= 0)
    order = kept[np.lexsort((kept, survey.cell[kept]))]
    number = np.full(near.nodes.position.shape[0], -1)
    number[order] = np.arange(order.size)
    _check_sizes(mesh, order.size, cells)
    source, destination = _processor_pairs(mesh, near.nodes.position, number, options)
    processor_work = options.processor_layers * np.bincount(destination, minlength=order.size)
    bounds = equal_work(np.maximum(survey.feeding[order], 1) + processor_work, cells.ranks)
    hidden, mine, owned = near.nodes[order], slice(bounds[rank], bounds[rank + 1]), cells.cells(rank)
    features = hidden[destination].towards(hidden.position[source])
    features /= np.sqrt(np.mean(features[:, 0] ** 2)) if features.size else 1.0
    here = (destination >= mine.start) & (destination < mine.stop)
    return Graph(
        rank,
        cells,
        bounds,
        np.stack([latitudes[owned], longitudes[owned]], axis=1),
        np.stack([mesh.latitudes, mesh.longitudes], axis=1)[order[mine]],
        _encoder(near, survey, number, mine),
        _edges(source[here], destination[here] - mine.start, features[here], mine),
        _decoder(near, number, owned),
    )


def _check_sizes(mesh: Mesh, hidden: int, cells: Partition) -> None:
    if hidden > cells.bounds[-1]:
        family, enough = mesh.name.rstrip("0123456789"), cells.bounds[-1] / hidden * mesh.latitudes.size
        fitting = [size for size in range(20 if family == "ico" else 3000) if 0 < mesh_nodes(family, size) <= enough]
        remedy = f"Try {family}{fitting[-1]} or coarser." if fitting else "Use a grid with more cells."
        raise PlanError(
            f"hidden mesh {mesh.name} is finer than the grid: {hidden} nodes, {cells.bounds[-1]} cells. {remedy}"
        )
    if cells.ranks > hidden:
        raise TopologyError(
            f"{hidden} hidden nodes cannot be cut over {cells.ranks} ranks. Use a finer hidden mesh than {mesh.name}, "
            f"or num_gpus_per_model of at most {hidden}."
        )


# -------------------------------------------------------------------------------------------------------------- edges
def _encoder(near: Near, survey: Survey, number: Int64, mine: slice) -> Edges:
    """Pairs that feed my hidden nodes; a node that none feeds is fed by its nearest cell."""
    owned, nearest = (number >= mine.start) & (number < mine.stop), survey.cell
    blocks = range(survey.first[owned].min(), survey.last[owned].max() + 1)
    found: list[tuple[Int64, Int64, Float64]] = []
    for block in blocks:
        position = near.cells(block).position
        pairs = near.pairs(position, block)
        feeds = pairs.feeds | ((survey.feeding[pairs.node] == 0) & (nearest[pairs.node] == pairs.cell))
        chosen = feeds & owned[pairs.node]
        cell, node = pairs.cell[chosen], pairs.node[chosen]
        features = near.nodes[node].towards(position[cell - block * BLOCK_CELLS]) / near.spacing
        found.append((cell, number[node] - mine.start, features))
    source, destination, features = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _edges(source, destination, features, mine)


def _decoder(near: Near, number: Int64, owned: slice) -> Edges:
    """From the nearest hidden nodes to each owned cell."""
    node = np.flatnonzero(number >= 0)
    tree, neighbours = cKDTree(near.nodes.position[node]), np.arange(1, min(DECODER_NEIGHBOURS, node.size) + 1)
    found: list[tuple[Int64, Float64]] = []
    for block in range(owned.start // BLOCK_CELLS, math.ceil(owned.stop / BLOCK_CELLS)):
        start = block * BLOCK_CELLS
        cells = near.cells(block)[max(owned.start - start, 0) : owned.stop - start]
        source = node[tree.query(cells.position, k=neighbours)[1].ravel()]
        cell = np.repeat(np.arange(len(cells.position)), neighbours.size)
        found.append((number[source], cells[cell].towards(near.nodes.position[source]) / near.spacing))
    source, features = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return _edges(source, np.repeat(np.arange(owned.stop - owned.start), neighbours.size), features, owned)


# ---------------------------------------------------------------------------------------------- hidden nodes and cuts
def _processor_pairs(mesh: Mesh, nodes: Float64, number: Int64, options: GraphOptions) -> tuple[Int64, Int64]:
    """Source and destination [processor edges], of all ranks."""
    if options.processor == "knn":
        node = np.flatnonzero(number >= 0)
        if node.size == 1:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        neighbours = np.arange(2, min(options.neighbours, node.size - 1) + 2)  # the nearest is the node itself
        source = cKDTree(nodes[node]).query(nodes[node], k=neighbours)[1]
        return number[node[source.ravel()]], np.repeat(number[node], neighbours.size)
    levels = mesh.levels if options.processor == "multiscale" else mesh.levels[-1:]
    source, destination = number[np.concatenate(levels, axis=1)]
    kept = (source >= 0) & (destination >= 0)
    return source[kept], destination[kept]


def equal_work(work: Int64, ranks: int) -> tuple[int, ...]:
    """Bounds of contiguous ranges whose work is the mean to within that of one node; none is empty."""
    done = np.concatenate([[0], np.cumsum(work)])
    bounds = [0]
    for rank in range(1, ranks):
        nearest = int(np.abs(done * ranks - rank * done[-1]).argmin())
        bounds.append(min(max(nearest, bounds[-1] + 1), work.size - ranks + rank))
    return (*bounds, work.size)


def _edges(source: Int64, destination: Int64, features: Float64, owned: slice) -> Edges:
    order = np.lexsort((source, destination))
    start, end = (ids[order].astype(np.int32) for ids in (source, destination))
    return Edges(start, end, features[order].astype(np.float32), int(owned.stop - owned.start))
