"""A new kind of source is one class and one line in a table; the rest of shardio never asks which kind it has."""

import ast
import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import shardio
from shardio.check.info import describe
from shardio.check.verify import check, compare
from shardio.rechunk import Request, prepare, run
from shardio.source import open as kinds
from shardio.source.extent import SourceExtent
from shardio.source.source import Source
from shardio.write.output import CHECKSUMS

DATES, VARIABLES, CELLS = 6, ("t", "q"), 23


class Arrays(Source):
    """A file of numpy arrays: fields [date, variable, cell], dates, latitudes, longitudes."""

    def __init__(self, path, selection):
        self.path = path
        self._file = np.load(path)
        self._fields = self._file["fields"]
        every = tuple(self._file["variables"].tolist())
        self._chosen = selection.variables(every, path)
        self.variables = tuple(every[i] for i in self._chosen)
        self.dates = self._file["dates"]
        self.latitudes, self.longitudes = self._file["latitudes"], self._file["longitudes"]
        self.attributes = {"resolution": "toy"}
        shape = (len(self.dates), len(every), 1, len(self.latitudes))
        self.extent = SourceExtent(shape, (1, *shape[1:]), 4, range(len(self.dates)), self._chosen)

    def fingerprint(self):
        return sha256(Path(self.path).read_bytes()).hexdigest()

    def read(self, dates, cells, out, pool=None):
        out[:, :, 0] = self._fields[dates][:, list(self._chosen), cells]

    def close(self):
        self._file.close()


def open_arrays(text, store, selection, fill_absent):
    return Arrays(text, selection) if text.endswith(".npz") else None


@pytest.fixture
def path(tmp_path):
    fields = np.random.default_rng(0).standard_normal((DATES, len(VARIABLES), CELLS)).astype(np.float32)
    dates = np.datetime64("2020-01-01", "s") + np.arange(DATES) * np.timedelta64(6, "h")
    places = {"latitudes": np.linspace(90, -90, CELLS), "longitudes": np.linspace(0, 350, CELLS)}
    np.savez(tmp_path / "toy.npz", fields=fields, variables=np.array(VARIABLES), dates=dates, **places)
    return tmp_path / "toy.npz"


@pytest.mark.parametrize("order", [None, "compact"])
def test_a_source_of_ones_own_is_cut_resumed_verified_and_compared(order, path, cli, tmp_path, monkeypatch):
    monkeypatch.setattr(kinds, "KINDS", (open_arrays, *kinds.KINDS))
    words = ("rechunk", path, tmp_path / "b.zarr", "-n", 4, "--json", "--select", "q")
    words += () if order is None else ("--order", order)
    done = cli(*words)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["dates"] == DATES
    dataset = shardio.open_dataset(tmp_path / "b.zarr")
    fields = np.load(path)["fields"][:, 1]
    if order:
        fields = fields[:, dataset.cell_order[0].values]
    assert np.array_equal(dataset[:, 0, 0], fields)
    assert np.allclose(dataset.statistics["mean"], fields.mean(dtype=np.float64))
    assert check(str(tmp_path / "b.zarr")) == []
    assert compare(str(tmp_path / "b.zarr"), str(path)) == []
    assert json.loads(cli(*words).stdout)["already_complete"]
    about = describe(str(path))
    assert (about["shape"]["cells"], about["resolution"]) == (CELLS, "toy")


def test_a_request_opens_a_source_of_ones_own(path, tmp_path):
    """What needs no line in a table: a function that gives the source."""
    request = Request("", str(tmp_path / "b.zarr"), 4, opener=lambda: open_arrays(str(path), None, kinds.ALL, False))
    assert run(prepare(request)).dates == DATES
    assert CHECKSUMS in [entry.name for entry in (tmp_path / "b.zarr").iterdir()]


def test_nobody_asks_which_kind_of_source_it_has():
    own = {"AnemoiSource", "CFSource", "SyntheticSource", "Reordered"}
    asked = []
    for file in Path(shardio.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                names = {inner.id for inner in ast.walk(node.args[1]) if isinstance(inner, ast.Name)}
                asked += [f"{file.name}: {ast.unparse(node)}" for _ in names & own]
    assert asked == []
