"""The history, drawn: a picture with one small trend per case, and a page with it and all numbers of the last run."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from tools.perf.gate import Change
from tools.perf.history import Run, SlowDown, is_comparable, noise, ratio
from tools.perf.matrix import WORKS

MOST_RUNS = 60
COLOURS = ("#2a78d6", "#eb6834")  # of 1 and 2 ranks
UNITS = {"rechunk": "dates", "load": "dates", "train": "steps", "forecast": "lead times"}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #0b0b0b }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #e1e0d9 } th:first-child, td:first-child
{ text-align: left } th { color: #52514e; font-weight: 500 } img { max-width: 100% } .flag { color: #b3400a }
"""


def write(folder: Path, runs: list[Run], changes: list[Change], slow: list[SlowDown]) -> Path:
    """`report.png` and `report.html` in the folder."""
    picture = folder / "report.png"
    draw(picture, runs)
    page = folder / "report.html"
    page.write_text(_page(runs[-1], base64.b64encode(picture.read_bytes()).decode(), changes, slow))
    return page


def draw(path: Path, runs: list[Run]) -> None:
    """Ratios to the calibration kernel: rows are grids, columns are works, bars are the noise of each run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [run for run in runs if is_comparable(run, runs[-1])][-MOST_RUNS:]
    grids = sorted({case.split("/")[0] for run in shown for case in run["cases"]})
    figure, axes = pyplot.subplots(len(grids), len(WORKS), figsize=(13, 2.2 * len(grids) + 0.8), squeeze=False)
    for row, grid in zip(axes, grids, strict=True):
        for axis, work in zip(row, WORKS, strict=True):
            for ranks, colour in zip((1, 2), COLOURS, strict=True):
                _trend(axis, shown, f"{grid}/{ranks}/{work}", colour, f"{ranks} rank{'s' if ranks > 1 else ''}")
            axis.set_ylim(bottom=0)
            axis.set_xlim(-0.5, max(len(shown), 2) - 0.5)
            axis.set_xticks([])
            axis.tick_params(labelsize=8, length=0)
            axis.grid(axis="y", color="#e1e0d9", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right", "left"]].set_visible(False)
            if grid == grids[0]:
                axis.set_title(work, fontsize=10)
        row[0].set_ylabel(grid, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel(f"{len(shown)} runs, the latest right", fontsize=8)
    lines = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), fontsize=9, frameon=False, loc="upper right")
    figure.suptitle("time of each case, in calibration kernels; bars: fastest to slowest repeat", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _trend(axis: Any, runs: list[Run], case: str, colour: str, label: str) -> None:
    import numpy as np

    found = [(place, run["cases"][case]) for place, run in enumerate(runs) if "ratios" in run["cases"].get(case, {})]
    if not found:
        return
    places, middle = [place for place, _ in found], [ratio(result) for _, result in found]
    low, high = ([edge(result["ratios"]) for _, result in found] for edge in (min, max))
    axis.vlines(places, low, high, color=colour, alpha=0.35, linewidth=2)
    axis.plot(places, middle, "o", color=colour, markersize=3.5, label=label)
    if len(places) > 2:
        axis.plot(places, np.polyval(np.polyfit(places, middle, 1), places), color=colour, linewidth=1.5)


def _page(run: Run, picture: str, changes: list[Change], slow: list[SlowDown]) -> str:
    state = f"{run['commit']}{' and changes' if run['changed'] else ''}"
    kernel = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in run["calibration"].items())
    lines = [
        f"<!doctype html><meta charset=utf-8><title>shardio performance</title><style>{STYLE}</style>",
        f"<h1>Performance at {html.escape(state)}</h1>",
        f"<p>{run['date']}, {html.escape(run['machine'])}, load {run['load']:.1f}. Calibration kernel: {kernel}.</p>",
        "<h2>Counters that changed</h2>",
        _list([str(change) for change in changes], "None: all are within 1 % of the baseline."),
        "<h2>Slower than noise explains</h2>",
        _list([str(one) for one in slow], "None."),
        f'<h2>Trends</h2><img alt="trends of all cases" src="data:image/png;base64,{picture}">',
        "<h2>Times of the last run</h2>",
        _times(run),
        "<h2>Counters of the last run</h2>",
        _counters(run),
    ]
    return "\n".join(lines) + "\n"


def _list(lines: list[str], otherwise: str) -> str:
    if not lines:
        return f"<p>{otherwise}</p>"
    return "<ul>" + "".join(f'<li class="flag">{html.escape(line)}</li>' for line in lines) + "</ul>"


def _times(run: Run) -> str:
    rows = []
    for case, result in run["cases"].items():
        if "ratios" not in result:
            continue
        seconds, work = sorted(result["seconds"])[len(result["seconds"]) // 2], case.rsplit("/", 1)[1]
        split = ", ".join(f"{name} {part / seconds:.0%}" for name, part in result["split"].items())
        speed = f"{result['units'] / seconds:.1f} {UNITS[work]}/s"
        numbers = [f"{ratio(result):.1f}", f"{noise(result):.0%}", f"{result['resident_bytes'] / 1e6:.0f} MB"]
        rows.append([case, f"{1e3 * seconds:.0f} ms", speed, *numbers, split])
    return _table(["grid/ranks/work", "median", "throughput", "kernels", "noise", "resident", "of the time"], rows)


def _counters(run: Run) -> str:
    names = list(dict.fromkeys(name for result in run["cases"].values() for name in result["counters"]))
    rows = [
        [case, *(f"{result['counters'][name]:,}" if name in result["counters"] else "" for name in names)]
        for case, result in run["cases"].items()
    ]
    return _table(["grid/ranks/work", *(name.replace("_", " ") for name in names)], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"
