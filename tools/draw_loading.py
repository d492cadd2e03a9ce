"""Draw docs/loading.png: how a date travels from grid-chunks to ranks. python tools/draw_loading.py."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

from shardio.load.partition import partition
from shardio.load.reading import Reading, meet
from shardio.load.topology import Topology

CELLS = 960
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")


def draw(axes: plt.Axes, grid_chunks: int, ranks: int, shared: bool, title: str) -> None:
    """One date on disk above, the ranks below, an arrow for each chunk read; dashed for cells that are exchanged."""
    owners = partition(CELLS, ranks, CELLS // grid_chunks)
    reading = Reading(owners, Topology(ranks, 0, ranks), shared=shared, whole=False)
    for chunk in range(grid_chunks):
        cells = reading.cells_of(chunk)
        axes.add_patch(Rectangle((cells.start, 2), cells.stop - cells.start, 0.5, fc="#dddddd", ec="white", lw=2))
        axes.text((cells.start + cells.stop) / 2, 2.25, str(chunk), ha="center", va="center", fontsize=8)
    for rank in range(ranks):
        own = owners.cells(rank)
        axes.add_patch(Rectangle((own.start, 0), own.stop - own.start, 0.5, fc=COLOURS[rank], ec="white", lw=2))
        label = f"rank {rank}\n{own.stop - own.start} cells"
        axes.text((own.start + own.stop) / 2, 0.25, label, ha="center", va="center", color="white", fontsize=8)
        for chunk in reading.chunks_read(0, rank):
            cells = reading.cells_of(chunk)
            middle = (cells.start + cells.stop) / 2
            kept = meet(cells, own)
            inside = (kept.start + kept.stop) / 2 if kept.stop > kept.start else (own.start + own.stop) / 2
            _arrow(axes, (middle, 2), (inside, 0.5), COLOURS[rank], "solid")
            for other in range(ranks):
                sent = meet(cells, owners.cells(other))
                if reading.exchanges and other != rank and sent.stop > sent.start:
                    _arrow(axes, (inside, 0.5), ((sent.start + sent.stop) / 2, 0.5), COLOURS[rank], "dashed", -0.4)
    axes.set(xlim=(-10, CELLS + 10), ylim=(-0.1, 2.6), title=title)
    axes.axis("off")


def _arrow(axes: plt.Axes, start: tuple, end: tuple, colour: str, style: str, bend: float = 0.0) -> None:
    connection = f"arc3,rad={bend}"
    arrow = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=10, color=colour, ls=style, lw=1.2, connectionstyle=connection
    )
    axes.add_patch(arrow)


if __name__ == "__main__":
    figure, panels = plt.subplots(1, 3, figsize=(13, 2.9), layout="constrained")
    draw(panels[0], 8, 4, False, "8 grid-chunks, 4 ranks:\neach rank reads its own")
    draw(panels[1], 5, 4, False, "5 grid-chunks, 4 ranks, no process group:\nshared chunks are read twice")
    draw(panels[2], 5, 4, True, "5 grid-chunks, 4 ranks, group=...:\nread once, the rest exchanged (dashed)")
    figure.savefig(Path(__file__).parents[1] / "docs" / "loading.png", dpi=100)
