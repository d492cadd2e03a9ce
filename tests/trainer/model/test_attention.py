"""Both kernels against the definition, edge by edge, in float64."""

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shardio.errors import PlanError
from trainer.graph.edge_lists import PADDING, EdgeLists, wants_tables
from trainer.model.attention import attend
from trainer.model.kernel import find_kernel
from trainer.model.kernels import cpp as attention_kernel
from trainer.model.kernels import gather

both_kernels = pytest.mark.parametrize("kernel", ["torch", "cpp"])
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


@dataclass
class Case:
    """A bipartite graph with random tensors on it."""

    source: list[int]
    destination: list[int]
    sources: int
    destinations: int
    batch: int = 1
    heads: int = 2
    depth: int = 16
    features: int = 3

    def __post_init__(self) -> None:
        """Edges are given by destination."""
        order = np.argsort(np.array(self.destination, dtype=np.int64), kind="stable")
        self.source, self.destination = (np.array(ids)[order].tolist() for ids in (self.source, self.destination))

    def lists(self, kernel: str) -> EdgeLists:
        ends = np.array(self.source, dtype=np.int64), np.array(self.destination, dtype=np.int64)
        return EdgeLists.build(*ends, self.sources, self.destinations, kernel=find_kernel(kernel, "cpu"))

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Query, key, value, tilt, features, all rounded as dtype rounds."""
        random = torch.Generator().manual_seed(0)
        rows = self.destinations, self.sources, self.sources, self.destinations
        widths = self.depth, self.depth, self.depth, self.features
        shapes = [(self.batch, count, self.heads, width) for count, width in zip(rows, widths, strict=True)]
        shapes.append((len(self.source), self.features))
        return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, tilt: Tensor, features: Tensor, case: Case
) -> tuple[Tensor, Tensor]:
    out, carried = [], []
    for node in range(case.destinations):
        edges = [edge for edge, end in enumerate(case.destination) if end == node]
        start, about = [case.source[edge] for edge in edges], features[edges]
        logits = torch.einsum("bhd,bnhd->bnh", query[:, node], key[:, start])
        logits = logits + torch.einsum("bhf,nf->bnh", tilt[:, node], about)
        p = (logits / query.shape[-1] ** 0.5).softmax(1)
        out.append(torch.einsum("bnh,bnhd->bhd", p, value[:, start]))
        carried.append(torch.einsum("bnh,nf->bhf", p, about))
    return torch.stack(out, 1), torch.stack(carried, 1)


Function = Callable[..., tuple[Tensor, Tensor]]


def outputs_and_gradients(function: Function, tensors: list[Tensor], last: Any) -> list[Tensor]:
    """The two sums, and the gradients of query, key, value and tilt for random gradients of the sums."""
    wanted = [tensor.detach().requires_grad_() for tensor in tensors[:4]]
    sums = function(*wanted, tensors[4], last)
    random = torch.Generator().manual_seed(1)
    back = [torch.randn(part.shape, generator=random, dtype=torch.float64).to(torch.bfloat16) for part in sums]
    gradients = torch.autograd.grad(sums, wanted, [g.to(part.dtype) for g, part in zip(back, sums, strict=True)])
    return [*(part.detach() for part in sums), *gradients]


def check(case: Case, kernel: str, dtype: torch.dtype, prepare: Callable[[Tensor], Tensor] = Tensor.contiguous) -> None:
    tensors = case.tensors(dtype)
    exact = outputs_and_gradients(by_definition, [tensor.double() for tensor in tensors], case)
    found = outputs_and_gradients(attend, [prepare(tensor) for tensor in tensors], case.lists(kernel))
    for name, a, b in zip(("out", "carried", "query", "key", "value", "tilt"), found, exact, strict=True):
        assert (a.dtype, a.shape) == (dtype, b.shape)
        size = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        worst = float((a.double() - b).abs().max()) if b.numel() else 0.0
        assert worst <= TOLERANCES[dtype] * size, f"{name} is off by {worst}"


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, neighbours apart."""
    apart = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), torch.nan, dtype=tensor.dtype)
    apart[..., 1::2] = tensor
    return apart[..., 1::2]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sources, destinations = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    edges = draw(st.lists(st.tuples(st.integers(0, sources - 1), st.integers(0, destinations - 1)), max_size=60))
    return Case(
        [start for start, _ in edges],
        [end for _, end in edges],
        sources,
        destinations,
        draw(st.sampled_from([1, 3])),
        *draw(st.sampled_from([(1, 1), (2, 8), (8, 16), (3, 5), (1, 32), (2, 64)])),
        draw(st.integers(0, 3)),
    )


def star(most: int) -> Case:
    """Destination i has i edges, the last one `most`; sources have from few to many."""
    random = np.random.default_rng(0)
    ends = np.repeat(np.arange(most + 1), np.arange(most + 1))
    start = np.minimum(random.geometric(0.05, ends.size), 99)
    order = random.permutation(ends.size)
    return Case(start[order].tolist(), ends[order].tolist(), 100, most + 1)


# ------------------------------------------------------------------------------------------------------------ exactness
@both_kernels
@given(case=cases(), dtype=st.sampled_from(list(TOLERANCES)), prepare=st.sampled_from([Tensor.contiguous, strided]))
@settings(max_examples=120, deadline=None)
def test_sums_and_gradients_are_those_of_the_definition(
    kernel: str, case: Case, dtype: torch.dtype, prepare: Callable[[Tensor], Tensor]
) -> None:
    check(case, kernel, dtype, prepare)


@both_kernels
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_nodes_of_no_edge_to_a_hundred_are_exact(kernel: str, dtype: torch.dtype) -> None:
    check(star(100), kernel, dtype)


def test_blocks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case = star(40)
    whole = outputs_and_gradients(attend, case.tensors(), case.lists("torch"))
    monkeypatch.setitem(gather.BLOCK, "cpu", 1)
    for a, b in zip(outputs_and_gradients(attend, case.tensors(), case.lists("torch")), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@both_kernels
def test_gradients_pass_gradcheck(kernel: str) -> None:
    case = Case([0, 2, 1, 2, 0, 1, 1], [0, 0, 1, 1, 2, 2, 2], 4, 4, batch=2, depth=2, features=2)
    *wanted, features = case.tensors()
    wanted = [tensor.requires_grad_() for tensor in wanted]
    assert torch.autograd.gradcheck(lambda *inputs: attend(*inputs, features, case.lists(kernel)), wanted)


@both_kernels
def test_large_logits_overflow_nothing(kernel: str) -> None:
    case = Case([0, 1, 0], [0, 0, 1], 2, 2, features=0)
    query, key, value, tilt, features = case.tensors(torch.float32)
    key[:, 1] = 1e4 * query[:, 0]
    out, _ = attend(query, key, value, tilt, features, case.lists(kernel))
    torch.testing.assert_close(out, value[:, [1, 0]])


@both_kernels
def test_what_is_not_a_number_stays_with_its_neighbours(kernel: str) -> None:
    case = star(10)
    tensors = case.tensors()
    broken = case.source[0]
    for tensor in tensors[1:3]:
        tensor[:, broken] = torch.nan
    near = sorted({end for start, end in zip(case.source, case.destination, strict=True) if start == broken})
    for rows in attend(*tensors, case.lists(kernel)):
        assert torch.equal(rows.isnan().any(-1).any(-1)[0].nonzero()[:, 0], torch.tensor(near))


# --------------------------------------------------------------------------------------------------- in a training step
@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@both_kernels
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_bits_are_the_same_each_time_and_with_any_number_of_threads(kernel: str, dtype: torch.dtype) -> None:
    case = star(60)
    found = []
    for count in (1, 2, 2, 3):
        with threads(count):
            found.append(outputs_and_gradients(attend, case.tensors(dtype), case.lists(kernel)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@both_kernels
def test_autocast_computes_from_bfloat16_and_sums_in_float32(kernel: str) -> None:
    case = star(20)
    lists, tensors = case.lists(kernel), case.tensors(torch.float32)
    rounded = [tensor.to(torch.bfloat16) for tensor in tensors[:4]]
    plain = outputs_and_gradients(attend, [*rounded, tensors[4]], lists)
    with torch.autocast("cpu", torch.bfloat16):
        found = outputs_and_gradients(attend, tensors, lists)
    assert [part.dtype for part in found] == [torch.bfloat16] * 2 + [torch.float32] * 4
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, plain, strict=True))


def linears(case: Case, lists: EdgeLists) -> tuple[Callable[[Tensor, Tensor], Tensor], list[Tensor]]:
    """A function of rows [batch, nodes, channels] with attention between linears, and what it wants gradients of."""
    channels = case.heads * case.depth
    random = torch.Generator().manual_seed(2)
    widths = case.depth, case.depth, case.depth, case.features
    weights = [torch.randn(channels, case.heads * width, generator=random) / channels**0.5 for width in widths]
    rows = [torch.randn(case.batch, count, channels, generator=random) for count in (case.destinations, case.sources)]
    leaves = [tensor.requires_grad_() for tensor in (*rows, *weights)]
    features = torch.randn(len(case.source), case.features, generator=random)

    def function(here: Tensor, there: Tensor) -> Tensor:
        ends = (here, there, there, here)
        parts = [(rows @ w).unflatten(2, (case.heads, -1)) for rows, w in zip(ends, weights, strict=True)]
        out, carried = attend(*parts, features, lists)
        return out.tanh().sum() + carried.sin().sum()

    return function, leaves


@both_kernels
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo itself looks at it
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_compiled_and_checkpointed_steps_give_the_same_numbers(
    kernel: str, backend: str | None, checkpointed: bool
) -> None:
    case = star(8)
    function, leaves = linears(case, case.lists(kernel))
    exact = torch.autograd.grad(function(*leaves[:2]), leaves)

    def step(here: Tensor, there: Tensor) -> Tensor:
        return checkpoint(function, here, there, use_reentrant=False) if checkpointed else function(here, there)

    compiled = torch.compile(step, backend=backend) if backend else step
    for a, b in zip(torch.autograd.grad(compiled(*leaves[:2]), leaves), exact, strict=True):
        torch.testing.assert_close(a, b)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest result has."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@both_kernels
def test_no_tensor_has_all_edges_and_all_channels(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gather.BLOCK, "cpu", 10_000)
    case = star(60)
    tensors, lists = case.tensors(), case.lists(kernel)
    with Largest() as largest:
        outputs_and_gradients(attend, tensors, lists)
    assert largest.numbers <= 10_000 < len(case.source) * case.heads * case.depth / 5


def test_many_different_degrees_make_few_tables_that_are_nearly_full() -> None:
    lists = star(100).lists("torch")
    for tables in (lists.incoming, lists.outgoing):
        places = sum(len(table) * table.width for table in tables)
        assert len(tables) <= 16
        assert lists.edges <= places <= lists.edges * PADDING / (PADDING - 1)
    regular = Case([0, 1, 2, 1, 2, 0], [0, 0, 1, 1, 2, 2], 3, 3).lists("torch")
    assert [table.full for table in (*regular.incoming, *regular.outgoing)] == [True, True]


# ----------------------------------------------------------------------------------------------------- the compiled one
@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A cache of its own for compiled kernels, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    attention_kernel.load.cache_clear()
    yield tmp_path
    attention_kernel.load.cache_clear()


def write_source(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "kernel.cpp").write_text(text)
    monkeypatch.setattr(attention_kernel, "SOURCE", folder / "kernel.cpp")


SMALL = 'extern "C" void attend_forward() {} extern "C" void attend_backward() {}'


def test_without_a_compiler_attention_is_torch_and_one_line_says_why(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    case = star(3)
    with caplog.at_level(logging.INFO):
        assert [wants_tables(case.lists("auto").kernel) for _ in range(3)] == [True] * 3
    (line,) = caplog.messages
    assert "there is no C++ compiler 'no-such-compiler'" in line
    with pytest.raises(PlanError, match=r"no C\+\+ compiler 'no-such-compiler'.* Use kernel auto or torch"):
        case.lists("cpp")
    check(case, "auto", torch.float32)


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing_behind(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(fresh, monkeypatch, "#error no such luck\n")
    library, why = attention_kernel.load()
    assert library is None
    assert "failed: " in why
    assert "no such luck" in why
    assert list((fresh / "shardio" / "kernels").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    (fresh / "file").touch()
    assert wants_tables(star(3).lists("auto").kernel)


def test_ranks_that_compile_at_once_all_get_the_library_and_later_ones_find_it(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(fresh, monkeypatch, SMALL)
    with ThreadPoolExecutor(4) as ranks:
        paths = {future.result() for future in [ranks.submit(attention_kernel._library) for _ in range(4)]}
    (path,) = paths
    assert list(path.parent.iterdir()) == [path]
    made = path.stat().st_mtime_ns
    assert attention_kernel.load()[0] is not None
    assert path.stat().st_mtime_ns == made


def test_a_compiler_that_does_not_know_this_processor_is_not_asked_for_it(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(fresh, monkeypatch, SMALL)
    monkeypatch.setattr(attention_kernel, "NATIVE", "-march=abacus")
    assert attention_kernel.load()[0] is not None


def test_a_cache_that_others_may_write_to_is_not_run_from(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_source(fresh, monkeypatch, SMALL)
    assert attention_kernel.load()[0] is not None
    folder = fresh / "shardio" / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    attention_kernel.load.cache_clear()
    library, why = attention_kernel.load()
    assert library is None
    assert f"others may write to {folder}" in why
    assert "mode 0700, or set XDG_CACHE_HOME" in why


def test_a_user_without_a_home_trains_without_the_kernel(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    library, why = attention_kernel.load()
    assert library is None
    assert "set XDG_CACHE_HOME" in why


def test_importing_compiles_nothing() -> None:
    load = "from trainer.model.kernels.cpp import load"
    code = f"from trainer.model.model import ModelOptions; {load}; assert load.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_types_that_the_compiled_kernel_does_not_know_are_computed_by_torch() -> None:
    case, dtype = star(5), torch.float16
    found, plain = (
        outputs_and_gradients(attend, case.tensors(dtype), case.lists(kernel)) for kernel in ("cpp", "torch")
    )
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


# ------------------------------------------------------------------------------------------------------------- refusals
def test_what_does_not_fit_is_refused_with_a_remedy() -> None:
    case = Case([0, 1], [0, 0], 2, 1)
    lists, tensors = case.lists("torch"), case.tensors()
    with pytest.raises(PlanError, match=r"value has shape \(1, 3, 2, 16\), not \(1, 2, 2, 16\)"):
        attend(*tensors[:2], torch.zeros(1, 3, 2, 16), *tensors[3:], lists)
    with pytest.raises(PlanError, match="Detach them"):
        attend(*tensors[:4], tensors[4].requires_grad_(), lists)
    with pytest.raises(PlanError, match=r"destinations 0 to 3, but there are 2\. Give local ids"):
        EdgeLists.build(np.array([0, 0]), np.array([0, 3]), 1, 2)
    with pytest.raises(PlanError, match=r"not in the order of their destinations\. Sort them, and their features"):
        EdgeLists.build(np.array([0, 0]), np.array([1, 0]), 1, 2)
    with pytest.raises(PlanError, match=r"sources \(2,\) and destinations \(1,\)"):
        EdgeLists.build(np.array([0, 0]), np.array([0]), 1, 2)
    with pytest.raises(PlanError, match=r"'cuda' is unknown\. Use one of: auto, cpp, torch"):
        find_kernel("cuda", "cpu")
    with pytest.raises(PlanError, match="it is for CPUs, not meta"):
        find_kernel("cpp", "meta")
