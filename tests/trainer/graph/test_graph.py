from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial import cKDTree

from shardio.errors import DatasetError, OutputError, PlanError, TopologyError
from shardio.load.partition import Partition, balanced, partition
from shardio.source.synthetic import octahedral
from trainer.graph.graph import BLOCK_CELLS, Edges, Graph, GraphOptions, build_graph
from trainer.graph.grid import Frames, build_mesh

Grid = tuple[np.ndarray, np.ndarray]
PARTS = ("encoder", "processor", "decoder")


def regular() -> Grid:
    rows, columns = np.meshgrid(np.arange(90, -91, -5.0), np.arange(0, 360, 5.0), indexing="ij")
    return rows.ravel(), columns.ravel()


def octahedral_cells() -> Grid:
    return octahedral("o24")[:2]


def o8() -> Grid:
    return octahedral("o8")[:2]


def o48() -> Grid:
    return octahedral("o48")[:2]


def scattered() -> Grid:
    """More cells than one block holds, each block all over the globe."""
    random = np.random.default_rng(4)
    cells = BLOCK_CELLS + 5000
    return np.degrees(np.arcsin(random.uniform(-1, 1, cells))), random.uniform(0, 360, cells)


def from_north_to_south() -> Grid:
    """Likewise, the second block close to the south pole."""
    latitudes, longitudes = scattered()
    order = np.argsort(-latitudes)
    return latitudes[order], longitudes[order]


def limited_area() -> Grid:
    rows, columns = np.meshgrid(np.arange(65, 35, -0.7), np.arange(-12, 30, 0.9), indexing="ij")
    return rows.ravel(), columns.ravel()


def irregular() -> Grid:
    random = np.random.default_rng(3)
    return np.degrees(np.arcsin(random.uniform(-1, 1, 3001))), random.uniform(-180, 180, 3001)


CASES = {
    "regular-knn": (regular, GraphOptions("o8")),
    "octahedral-multiscale": (octahedral_cells, GraphOptions("ico3", processor="multiscale")),
    "limited-area-mesh": (limited_area, GraphOptions("ico5", processor="mesh")),
    "limited-area-knn": (limited_area, GraphOptions("o40", cutoff=1.3, neighbours=5)),
    "irregular-knn": (irregular, GraphOptions("ico3", processor_layers=4)),
    "cut-off-too-short": (octahedral_cells, GraphOptions("o16", cutoff=0.3)),
}
every_case = pytest.mark.parametrize(("grid", "options"), CASES.values(), ids=CASES)


@cache
def build(grid: Callable[[], Grid], options: GraphOptions, ranks: int = 1) -> list[Graph]:
    """The graphs of all ranks; the cells in 7 grid-chunks, so that the cut is uneven."""
    latitudes, longitudes = grid()
    cut = partition(latitudes.size, ranks, -(-latitudes.size // 7))
    return [build_graph(latitudes, longitudes, cut, rank, options) for rank in range(ranks)]


def whole(graphs: list[Graph], part: str) -> dict[str, np.ndarray]:
    """The edges of all ranks, both ends global."""
    edges: list[Edges] = [getattr(graph, part) for graph in graphs]
    owned = [graph.cells.cells(graph.rank) if part == "decoder" else graph.hidden for graph in graphs]
    for each, nodes in zip(edges, owned, strict=True):
        assert each.destinations == nodes.stop - nodes.start
        assert ((each.destination >= 0) & (each.destination < each.destinations)).all()
    return {
        "source": np.concatenate([each.source for each in edges]),
        "destination": np.concatenate([e.destination + nodes.start for e, nodes in zip(edges, owned, strict=True)]),
        "features": np.concatenate([each.features for each in edges]),
    }


def coordinates(graphs: list[Graph]) -> tuple[np.ndarray, np.ndarray]:
    cells = np.concatenate([graph.cell_coordinates for graph in graphs])
    return cells, np.concatenate([graph.hidden_coordinates for graph in graphs])


def places(coordinates: np.ndarray) -> np.ndarray:
    return Frames.of(*coordinates.T).position


@every_case
def test_union_over_ranks_is_the_one_rank_graph_bit_for_bit(grid: Callable[[], Grid], options: GraphOptions) -> None:
    one = build(grid, options)
    for ranks in (2, 3, 4):
        many = build(grid, options, ranks)
        assert len({graph.hidden_bounds for graph in many}) == 1
        for part in PARTS:
            expected, union = whole(one, part), whole(many, part)
            assert all(np.array_equal(union[name], expected[name]) for name in expected)
            assert union["source"].dtype == np.int32
            assert union["features"].dtype == np.float32
        assert all(np.array_equal(a, b) for a, b in zip(coordinates(many), coordinates(one), strict=True))


def named(graph: Graph, part: str, cell: np.ndarray) -> np.ndarray:
    """[edges, 5], sorted: both ends under names that no order of the cells changes, and the features."""
    edges = getattr(graph, part)
    _, node = np.unique(graph.hidden_coordinates, axis=0, return_inverse=True)
    source = (cell if part == "encoder" else node)[edges.source]
    destination = (cell if part == "decoder" else node)[edges.destination]
    rows = np.column_stack([source, destination, edges.features])
    return rows[np.lexsort((source, destination))]


@every_case
@pytest.mark.parametrize("order", ["shuffled", "backwards"])
def test_the_order_of_the_cells_decides_no_edge(grid: Callable[[], Grid], options: GraphOptions, order: str) -> None:
    """Symmetric grids have cells as near to one hidden node as to another, and nodes as near to one another."""
    latitudes, longitudes = grid()
    native = np.arange(latitudes.size)
    cell = native[::-1] if order == "backwards" else np.random.default_rng(7).permutation(latitudes.size)
    (graph,) = build(grid, options)
    other = build_graph(latitudes[cell], longitudes[cell], partition(cell.size, 1, cell.size), 0, options)
    for part in PARTS:
        assert np.array_equal(named(graph, part, native), named(other, part, cell)), part


@pytest.mark.parametrize("grid", [scattered, from_north_to_south])
def test_cells_in_several_blocks_make_the_same_graph_as_in_one(grid: Callable[[], Grid]) -> None:
    options = GraphOptions("o12", cutoff=1.0)
    one, many = build(grid, options), build(grid, options, 3)
    for part in PARTS:
        assert all(
            np.array_equal(a, b) for a, b in zip(whole(one, part).values(), whole(many, part).values(), strict=True)
        )
    cells, hidden = (places(each) for each in coordinates(one))
    tree, edges = cKDTree(cells), one[0].encoder
    nearest = tree.query(hidden)[1]
    assert np.array_equal(nearest, np.sort(nearest))
    reach = 2 * np.sin(build_mesh("o12").spacing / 2)
    assert np.array_equal(np.diff(edges.offsets), tree.query_ball_point(hidden, reach, return_length=True))
    assert np.array_equal(np.unique(edges.source), np.arange(len(cells)))


@every_case
def test_encoder_is_the_cut_off_and_every_cell_feeds_and_every_node_is_fed(
    grid: Callable[[], Grid], options: GraphOptions
) -> None:
    graphs = build(grid, options)
    cells, hidden = (places(each) for each in coordinates(graphs))
    chord = np.linalg.norm(cells[:, None] - hidden, axis=2)
    expected = chord <= 2 * np.sin(options.cutoff * build_mesh(options.hidden).spacing / 2)
    edges = np.zeros_like(expected)
    edges[graphs[0].encoder.source, graphs[0].encoder.destination] = True
    assert edges.sum() == graphs[0].encoder.source.size
    assert edges.any(axis=0).all()
    assert edges.any(axis=1).all()
    assert (edges >= expected).all()
    # What is beyond the cut-off is there for a cell or a node that would have no edge.
    cell, node = np.nonzero(edges & ~expected)
    lonely_cell, lonely_node = ~expected[cell].any(axis=1), ~expected[:, node].any(axis=0)
    assert (lonely_cell | lonely_node).all()
    nearest = np.isclose(chord[cell, node], chord[cell].min(axis=1), rtol=1e-12)
    assert (nearest | lonely_node).all()


@every_case
def test_decoder_comes_from_the_three_nearest_hidden_nodes(grid: Callable[[], Grid], options: GraphOptions) -> None:
    graphs = build(grid, options)
    cells, hidden = (places(each) for each in coordinates(graphs))
    source = graphs[0].decoder.source.reshape(-1, 3)
    assert np.array_equal(graphs[0].decoder.destination, np.repeat(np.arange(len(cells)), 3))
    found = np.sort(np.linalg.norm(cells[:, None] - hidden[source], axis=2), axis=1)
    expected = np.sort(np.linalg.norm(cells[:, None] - hidden, axis=2), axis=1)[:, :3]
    np.testing.assert_allclose(found, expected, atol=1e-14)


@every_case
def test_edges_are_sorted_and_each_is_there_once(grid: Callable[[], Grid], options: GraphOptions) -> None:
    for graph in build(grid, options, 3):
        for part in PARTS:
            edges: Edges = getattr(graph, part)
            ends = np.stack([edges.destination, edges.source])
            assert np.array_equal(ends, np.unique(ends, axis=1))
            degrees = np.bincount(edges.destination, minlength=edges.destinations)
            assert np.array_equal(np.diff(edges.offsets), degrees)
            assert edges.offsets[-1] == edges.source.size


def test_processor_edges_are_the_nearest_neighbours_or_those_of_the_mesh() -> None:
    for options in (GraphOptions("o8", neighbours=6), GraphOptions("ico3", processor="mesh")):
        graphs = build(octahedral_cells, options)
        hidden, edges = places(coordinates(graphs)[1]), graphs[0].processor
        chord = np.linalg.norm(hidden[edges.source] - hidden[edges.destination], axis=1)
        assert chord.min() > 0
        counts = np.bincount(edges.destination)
        assert set(counts) == ({6} if options.processor == "knn" else {5, 6})
        every = np.sort(cKDTree(hidden).query(hidden, k=7)[0][:, 1:], axis=1)
        found = [np.sort(part) for part in np.split(chord, edges.offsets[1:-1])]
        for mine, best in zip(found, every, strict=True):
            np.testing.assert_allclose(mine, best[: mine.size], atol=1e-14)
    fine, all_levels = (build(octahedral_cells, GraphOptions("ico3", processor=p)) for p in ("mesh", "multiscale"))
    assert (fine[0].processor.source.size, all_levels[0].processor.source.size) == (60 * 4**3, 60 * (1 + 4 + 16 + 64))


@every_case
def test_features_are_length_and_direction_in_the_destinations_frame(
    grid: Callable[[], Grid], options: GraphOptions
) -> None:
    (graph,) = build(grid, options)
    cells, hidden = graph.cell_coordinates, graph.hidden_coordinates
    ends = {"encoder": (cells, hidden), "processor": (hidden, hidden), "decoder": (hidden, cells)}
    for part, (sources, destinations) in ends.items():
        edges: Edges = getattr(graph, part)
        (lat, lon), (lat0, lon0) = (
            np.radians(each).T for each in (sources[edges.source], destinations[edges.destination])
        )
        north = np.sin(lat) * np.cos(lat0) - np.cos(lat) * np.sin(lat0) * np.cos(lon - lon0)
        east = np.cos(lat) * np.sin(lon - lon0)
        length = np.sqrt(
            2 - 2 * np.clip(np.sin(lat) * np.sin(lat0) + np.cos(lat) * np.cos(lat0) * np.cos(lon - lon0), -1, 1)
        )
        scale = np.sqrt(np.mean(length**2)) if part == "processor" else build_mesh(options.hidden).spacing
        np.testing.assert_allclose(edges.features, np.stack([length, east, north], axis=1) / scale, atol=2e-6)


@every_case
def test_work_of_every_rank_is_the_mean_to_within_one_node(grid: Callable[[], Grid], options: GraphOptions) -> None:
    for ranks in (2, 3, 4):
        graphs = build(grid, options, ranks)
        encoder, processor = (np.bincount(whole(graphs, part)["destination"]) for part in PARTS[:2])
        node = encoder + options.processor_layers * processor
        work = [node[graph.hidden].sum() for graph in graphs]
        assert max(work) <= node.sum() / ranks + node.max()


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("layers", [1, 16])
def test_work_from_o48_to_ico3_is_balanced_to_5_percent(ranks: int, layers: int) -> None:
    options = GraphOptions("ico3", processor="multiscale", processor_layers=layers)
    graphs = build(o48, options, ranks)
    work = np.array([graph.encoder.source.size + layers * graph.processor.source.size for graph in graphs])
    assert work.max() / work.mean() <= 1.05


def test_hidden_nodes_lie_with_the_cells_of_their_rank() -> None:
    graphs = build(o48, GraphOptions("ico3"), 4)
    for graph in graphs:
        owned, source = graph.cells.cells(graph.rank), graph.encoder.source
        assert np.mean((source >= owned.start) & (source < owned.stop)) > 0.85


def test_only_the_mesh_near_a_limited_area_is_kept() -> None:
    (graph,) = build(limited_area, GraphOptions("ico5"))
    mesh = build_mesh("ico5")
    tree = cKDTree(places(graph.cell_coordinates))
    near = tree.query(Frames.of(mesh.latitudes, mesh.longitudes).position)[0] <= 2 * np.sin(mesh.spacing / 2)
    kept = {tuple(place) for place in graph.hidden_coordinates}
    assert kept == set(zip(mesh.latitudes[near], mesh.longitudes[near], strict=True))
    assert len(kept) < mesh.latitudes.size / 20


def test_tiny_grids_make_graphs() -> None:
    grid = np.array([10.0, 11.0, 12.0]), np.array([0.0, 1.0, 0.5])
    for hidden in ("ico0", "ico1", "o1"):
        graph = build_graph(*grid, Partition((0, 3), 3, True), 0, GraphOptions(hidden))
        assert set(graph.encoder.source) == {0, 1, 2}
        assert graph.encoder.destinations == graph.hidden.stop <= 3


def test_a_hidden_node_on_a_cell_is_fed_by_it() -> None:
    (graph,) = build(o8, GraphOptions("o8", cutoff=0.1))
    assert np.array_equal(graph.encoder.source, graph.encoder.destination)
    assert np.array_equal(graph.encoder.features, np.zeros((544, 3)))


def test_a_cached_graph_is_read_and_a_damaged_one_is_built_again(tmp_path: Path) -> None:
    grid, options = octahedral("o8")[:2], GraphOptions("ico1")
    cut = Partition(balanced(grid[0].size, 2), grid[0].size, False)
    built = build_graph(*grid, cut, 1, options, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    first = file.stat()
    read = build_graph(*grid, cut, 1, options, tmp_path / "cache")
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    content = bytearray(file.read_bytes())
    content[content.index(built.encoder.features.tobytes()) + 1] ^= 1
    file.write_bytes(content)
    again = build_graph(*grid, cut, 1, options, tmp_path / "cache")
    assert file.stat().st_ino != first.st_ino
    for graph in (read, again):
        assert (graph.rank, graph.cells, graph.hidden_bounds) == (1, cut, built.hidden_bounds)
        for part in PARTS:
            for name, array in vars(getattr(built, part)).items():
                assert np.array_equal(getattr(getattr(graph, part), name), array)
        assert np.array_equal(graph.cell_coordinates, built.cell_coordinates)
        assert np.array_equal(graph.hidden_coordinates, built.hidden_coordinates)


def test_every_input_has_its_own_cache_file(tmp_path: Path) -> None:
    latitudes, longitudes, _ = octahedral("o8")
    one, two = (Partition(balanced(544, ranks), 544, False) for ranks in (1, 2))
    ico1 = GraphOptions("ico1")
    for inputs in (
        (latitudes, longitudes, one, 0, ico1),
        (latitudes, longitudes, two, 0, ico1),
        (latitudes, longitudes, two, 1, ico1),
        (latitudes, longitudes, one, 0, GraphOptions("ico1", cutoff=0.8)),
        (latitudes, longitudes, one, 0, GraphOptions("ico1", processor="mesh")),
        (latitudes, longitudes + 1e-9, one, 0, ico1),
        (-latitudes, longitudes, one, 0, ico1),
    ):
        build_graph(*inputs, tmp_path)
    assert len(list(tmp_path.iterdir())) == 7


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cache elsewhere"):
        build_graph(*octahedral("o8")[:2], Partition((0, 544), 544, True), 0, GraphOptions("ico1"), tmp_path / "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": "o9"}, r"o9 is finer than the grid: 648 nodes, 544 cells. Try o8 or coarser"),
        ({"hidden": "ico3"}, r"ico3 is finer than the grid: \d+ nodes, 544 cells. Try ico2 or coarser"),
        ({"hidden": "n8"}, "'n8' names no hidden mesh"),
        ({"hidden": "o4", "processor": "mesh"}, "o4 has no mesh edges"),
        ({"processor": "delaunay"}, "Use one of: knn, mesh, multiscale"),
        ({"cutoff": float("nan")}, "cutoff is nan. Use 0 or more"),
        ({"neighbours": 0}, "neighbours is 0. Use 1 or more"),
    ],
)
def test_a_graph_that_cannot_be_built_is_refused_with_a_remedy(options: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build_graph(*octahedral("o8")[:2], Partition((0, 544), 544, True), 0, GraphOptions(**options))


def test_remedies_for_a_mesh_finer_than_a_limited_area_lead_to_one_that_fits() -> None:
    hidden = "o200"
    for _ in range(3):
        try:
            (graph,) = build(limited_area, GraphOptions(hidden))
        except PlanError as refusal:
            hidden = str(refusal).split("Try ")[1].split(" or coarser")[0]
    assert 150 < int(hidden[1:]) < 170
    assert 0.9 * graph.cells.bounds[-1] < graph.encoder.destinations <= graph.cells.bounds[-1]


def test_cells_and_ranks_that_do_not_fit_are_refused() -> None:
    latitudes, longitudes, _ = octahedral("o8")
    cut = Partition(balanced(544, 13), 544, False)
    with pytest.raises(TopologyError, match=r"12 hidden nodes cannot be cut over 13 ranks. Use a finer hidden mesh"):
        build_graph(latitudes, longitudes, cut, 0, GraphOptions("ico0"))
    with pytest.raises(TopologyError, match="rank 13 is not in a model group of 13"):
        build_graph(latitudes, longitudes, cut, 13)
    with pytest.raises(PlanError, match="partition is of 544 cells, the grid has 543"):
        build_graph(latitudes[1:], longitudes[1:], cut, 0)
    with pytest.raises(DatasetError, match="544 cells have no place"):
        build_graph(latitudes * np.nan, longitudes, cut, 0)
