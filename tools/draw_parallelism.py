"""Draw docs/parallelism.png: who owns which cells and hidden nodes, what a rank borrows, and what a step sends.

python -m tools.draw_parallelism
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from shardio.load.partition import partition
from shardio.source.synthetic import octahedral
from trainer.graph.graph import GraphOptions, build_graph

RANKS, SHOWN = 4, 1
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")


def draw_map(axes: plt.Axes) -> None:
    """Cells and hidden nodes in the colour of their rank; what rank 1 borrows has a black edge."""
    latitudes, longitudes, _ = octahedral("o16")
    cells = partition(latitudes.size, RANKS, latitudes.size // RANKS)
    graphs = [build_graph(latitudes, longitudes, cells, rank, GraphOptions("ico2")) for rank in range(RANKS)]
    mine = graphs[SHOWN]
    borrowed = [np.unique(edges.source) for edges in (mine.encoder, mine.processor)]
    for rank, graph in enumerate(graphs):
        for coordinates, size, marker in ((graph.cell_coordinates, 5, "o"), (graph.hidden_coordinates, 42, "^")):
            axes.scatter(coordinates[:, 1], coordinates[:, 0], s=size, marker=marker, color=COLOURS[rank], lw=0)
    every = [np.concatenate([getattr(graph, kind) for graph in graphs]) for kind in KINDS]
    owned = (cells.cells(SHOWN), mine.hidden)
    for coordinates, needed, own, size, marker in zip(every, borrowed, owned, (9, 50), "o^", strict=True):
        halo = needed[(needed < own.start) | (needed >= own.stop)]
        axes.scatter(coordinates[halo, 1], coordinates[halo, 0], s=size, marker=marker, fc="none", ec="black", lw=0.9)
    axes.set(title="cells (dots) and hidden nodes (triangles) by rank;\nblack edges: halo of rank 1", xlim=(-4, 364))
    axes.set(xticks=[], yticks=[])


KINDS = ("cell_coordinates", "hidden_coordinates")
STEPS = (
    ("grid-chunks on disk", "reads its own chunks"),
    ("fields  [batch, time, ensemble, cells/M, variables]", "halo of cells: raw inputs"),
    ("encoder  ->  [batch, hidden/M, channels]", "halo of hidden nodes, in every layer"),
    ("processor  ->  [batch, hidden/M, channels]", "halo of hidden nodes"),
    ("decoder  ->  [batch, cells/M, variables]", "two numbers per variable: all-reduce"),
    ("loss, the same on all ranks", "gradients of halo rows, back to their owners"),
    ("backward", "gradients of weights: one all-reduce"),
    ("optimizer", None),
)


def draw_step(axes: plt.Axes) -> None:
    """The journey of a batch on one rank; on the arrows what travels."""
    for i, (name, sent) in enumerate(STEPS):
        top = -1.25 * i
        axes.add_patch(FancyBboxPatch((0, top), 6, 0.55, boxstyle="round,pad=0.05", fc="#e8eef6", ec="#4c78a8"))
        axes.text(3, top + 0.28, name, ha="center", va="center", fontsize=8.5)
        if sent:
            arrow = FancyArrowPatch((3, top - 0.06), (3, top - 0.64), arrowstyle="-|>", mutation_scale=11, color="#555")
            axes.add_patch(arrow)
            axes.text(3.2, top - 0.36, sent, va="center", fontsize=8, color="#b5520b")
    axes.set(xlim=(-0.2, 6.2), ylim=(-9.0, 0.8), title="one step of one rank; in orange what travels")
    axes.axis("off")


if __name__ == "__main__":
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.6), layout="constrained", width_ratios=(1.5, 1))
    draw_map(panels[0])
    draw_step(panels[1])
    figure.savefig(Path(__file__).parents[1] / "docs" / "parallelism.png", dpi=90)
