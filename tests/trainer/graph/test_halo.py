"""The exchange between real processes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import RANKS

from shardio.errors import PlanError, TopologyError
from shardio.load.partition import balanced, partition
from shardio.source.synthetic import octahedral
from trainer.comm import Alone, TorchComm
from trainer.graph.graph import GraphOptions, build_graph
from trainer.graph.halo import build_halo, exchange

Arrays = dict[str, Any]


# -------------------------------------------------------------------------------------------- what a rank can be told
def exchange_and_back(rank: int, comm: Any, source: Any, bounds: Any, values: Any, cotangent: Any) -> Arrays:
    halo = build_halo(source, bounds, comm)
    gradients = []
    for _ in range(2):
        owned = torch.tensor(values, requires_grad=True)
        rows = exchange(owned, halo)
        rows.backward(torch.tensor(cotangent))
        gradients.append(owned.grad.numpy())
    traffic = halo.traffic(row_bytes=values.shape[-1] * values.itemsize)
    return {
        "rows": rows.detach().numpy(),
        "source": halo.source.numpy(),
        "gradients": gradients,
        "counts": (halo.send_counts, halo.receive_counts),
        "traffic": (halo.traffic(), traffic),
    }


def sum_over_edges(rank: int, comm: Any, options: Any, steps: int, values: Any) -> Arrays:
    latitudes, longitudes, _ = octahedral("o8")
    graph = build_graph(latitudes, longitudes, partition(latitudes.size, comm.ranks, 1), rank, options)
    cells = torch.tensor(values[graph.cells.cells(rank)], requires_grad=True)
    parts = [(graph.encoder, graph.cells.bounds), *[(graph.processor, graph.hidden_bounds)] * steps]
    rows = cells
    for edges, bounds in [*parts, (graph.decoder, graph.hidden_bounds)]:
        halo = build_halo(edges.source, bounds, comm)
        weight = torch.from_numpy(edges.features.astype(np.float64))[:, :1]
        messages = torch.tanh(exchange(rows, halo)[halo.source] * weight)
        rows = torch.zeros(edges.destinations, 2, dtype=torch.float64)
        rows = rows.index_add(0, torch.from_numpy(edges.destination), messages)
    rows.square().sum().backward()
    return {"rows": rows.detach().numpy(), "gradient": cells.grad.numpy()}


def narrow(rank: int, comm: Any, dtype: str) -> list[float]:
    halo = build_halo(np.array([0, 2]), (0, 1, 3), comm)
    owned = torch.full((halo.owned, 1), rank + 0.5, dtype=getattr(torch, dtype), requires_grad=True)
    rows = exchange(owned, halo)
    rows.sum().backward()
    assert rows.dtype == owned.grad.dtype == owned.dtype
    return [*rows.flatten().tolist(), *owned.grad.flatten().tolist()]


def refusals(rank: int, comm: Any) -> list[str]:
    mine = np.array([rank], dtype=np.int64)
    halo = build_halo(mine, (0, 1, 2), comm)
    row = torch.zeros(1, 1)
    return [
        refusal(TopologyError, lambda: build_halo(mine, (0, 1, 2, 3), comm)),
        refusal(TopologyError, lambda: exchange(row, replace(halo, comm=TorchComm()))),
        refusal(TopologyError, lambda: build_halo(np.arange(4), (0, 3, 4) if rank else (0, 1, 4), comm)),
    ]


def refusal(error: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


# ---------------------------------------------------------------------------------------------------------- the tests
Run = Callable[[Callable[..., Any], Sequence[Arrays]], list[Any]]


class Cut:
    """A random graph as the halo sees it, and what the exchange has to give, by indexing the full array."""

    def __init__(self, sizes: Sequence[int], sources: Sequence[Sequence[int]], leading: tuple[int, ...], seed: int):
        self.bounds = (0, *(int(bound) for bound in np.cumsum(sizes)))
        self.sources = [np.array(source, dtype=np.int64) for source in sources]
        self.owned = [np.arange(*ends) for ends in zip(self.bounds, self.bounds[1:], strict=False)]
        self.halo = [np.setdiff1d(source, mine) for source, mine in zip(self.sources, self.owned, strict=True)]
        self.rows = [np.concatenate(ids) for ids in zip(self.owned, self.halo, strict=True)]
        random = np.random.default_rng(seed)
        self.values = random.standard_normal((*leading, self.bounds[-1], 3))
        self.cotangents = [random.standard_normal((*leading, rows.size, 3)) for rows in self.rows]

    def arguments(self) -> list[Arrays]:
        return [
            {
                "source": source,
                "bounds": self.bounds,
                "values": self.values[..., mine, :],
                "cotangent": cotangent,
            }
            for source, mine, cotangent in zip(self.sources, self.owned, self.cotangents, strict=True)
        ]

    def gradient(self) -> np.ndarray:
        """Of sum over ranks <rows, cotangent>, gathered by one rank that has everything."""
        full = torch.tensor(self.values, requires_grad=True)
        parts = zip(self.rows, self.cotangents, strict=True)
        sum((full[..., rows, :] * torch.tensor(back)).sum() for rows, back in parts).backward()
        return full.grad.numpy()


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=RANKS))
    ids = st.lists(st.integers(0, sum(sizes) - 1), max_size=20)
    sources = draw(st.lists(ids, min_size=len(sizes), max_size=len(sizes)))
    return Cut(sizes, sources, draw(st.sampled_from([(), (2,), (2, 1), (2, 3)])), draw(st.integers(0, 99)))


@given(cut=cuts())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_exchange_is_indexing_the_full_array_and_backward_is_its_adjoint(run: Run, cut: Cut) -> None:
    replies = run(exchange_and_back, cut.arguments())
    for reply, ids, source in zip(replies, cut.rows, cut.sources, strict=True):
        assert np.array_equal(reply["rows"], cut.values[..., ids, :])
        assert np.array_equal(ids[reply["source"]], source)
        assert np.array_equal(*reply["gradients"])
    gradient = np.concatenate([reply["gradients"][0] for reply in replies], axis=-2)
    np.testing.assert_allclose(gradient, cut.gradient(), rtol=1e-12, atol=1e-12)
    forward = sum(np.vdot(reply["rows"], back) for reply, back in zip(replies, cut.cotangents, strict=True))
    scale = 1.0 + np.linalg.norm(cut.values) * np.linalg.norm(gradient)
    assert abs(forward - np.vdot(cut.values, gradient)) <= 1e-12 * scale


@given(cut=cuts())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_rows_sent_are_the_cut_sources_and_no_more(run: Run, cut: Cut) -> None:
    replies = run(exchange_and_back, cut.arguments())
    ranks = range(len(cut.owned))
    for sender in ranks:
        lent = [len(set(cut.sources[receiver]) & set(cut.owned[sender])) * (receiver != sender) for receiver in ranks]
        sent, received = replies[sender]["counts"]
        assert sent == tuple(lent)
        rows, bytes_ = replies[sender]["traffic"]
        assert (rows.sent, rows.received) == (sum(lent), sum(received))
        assert rows.received == cut.halo[sender].size
        assert rows.all_gather == cut.owned[sender].size * (len(ranks) - 1)
        assert bytes_.sent == rows.sent * 3 * 8


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("options", [GraphOptions("ico1", processor="multiscale"), GraphOptions("o3", neighbours=3)])
def test_messages_over_a_cut_graph_and_their_gradients_are_those_of_one_rank(
    run: Run, options: GraphOptions, ranks: int
) -> None:
    values = np.random.default_rng(0).standard_normal((octahedral("o8")[0].size, 2))
    more = {"options": options, "steps": 2, "values": values}
    (whole,) = run(sum_over_edges, [more])
    parts = run(sum_over_edges, [more] * ranks)
    for name in ("rows", "gradient"):
        np.testing.assert_allclose(np.concatenate([part[name] for part in parts]), whole[name], rtol=1e-12, atol=1e-13)


def test_gradients_of_a_row_that_all_ranks_borrow_are_added_the_same_way_each_time(run: Run) -> None:
    cut = Cut([1, 2, 2, 2], [[0], [0], [0], [0]], (), seed=1)
    first, second = (run(exchange_and_back, cut.arguments()) for _ in range(2))
    back = [cotangent[np.flatnonzero(rows == 0)[0]] for cotangent, rows in zip(cut.cotangents, cut.rows, strict=True)]
    assert np.array_equal(first[0]["gradients"][0][0], back[0] + ((back[1] + back[2]) + back[3]))
    assert np.array_equal(first[0]["gradients"][0], second[0]["gradients"][0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_travel_in_their_own_type(run: Run, dtype: str) -> None:
    first, second = run(narrow, [{"dtype": dtype}] * 2)
    assert first == [0.5, 1.5, 2.0]
    assert second == [1.5, 1.5, 0.5, 1.0, 2.0]


def test_a_halo_of_another_group_or_cut_is_refused_before_anything_is_sent(run: Run) -> None:
    for bounds, group, disagree in run(refusals, [{}, {}]):
        assert "for 3 ranks, the model group has 2. Give the model group" in bounds
        assert "for 2 ranks, the model group has 4" in group
        assert "Give the same bounds on all ranks" in disagree


def test_one_rank_needs_no_process_group() -> None:
    halo = build_halo(np.array([2, 0, 2]), (0, 3), Alone())
    owned = torch.arange(6.0).reshape(3, 2).requires_grad_()
    rows = exchange(owned, halo)
    rows[halo.source].sum().backward()
    assert torch.equal(rows, owned)
    assert owned.grad.tolist() == [[1, 1], [0, 0], [2, 2]]
    assert halo.rows == 3
    assert halo.traffic().sent == halo.traffic().all_gather == 0


def test_what_does_not_fit_is_refused_with_a_remedy() -> None:
    halo = build_halo(np.array([0]), balanced(3, 1), Alone())
    assert "halo was built for [..., 3, channels]" in refusal(TopologyError, lambda: exchange(torch.zeros(2, 1), halo))
    assert "model group has 1" in refusal(TopologyError, lambda: build_halo(np.array([0]), (0, 1, 2), Alone()))
    assert "nodes 0 to 2" in refusal(PlanError, lambda: build_halo(np.array([3]), (0, 3), Alone()))
