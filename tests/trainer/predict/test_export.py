"""An exported model makes the forecast that it made where it was trained: in Python, compiled, and in C++."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forecasting import START, share_of, trained
from torch import Tensor

from shardio import open_dataset
from shardio.errors import DatasetError, OutputError, PlanError
from shardio.rechunk import Request, prepare, run
from trainer.cli.export import main
from trainer.graph.pretend import FakeComm
from trainer.predict.export import Exported, compile_program, compiled_path, export, read_program
from trainer.predict.forecast import Forecast, load

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "cpp"
LACKING = 1  # sst, in outputs
Loaded = tuple[torch.export.ExportedProgram, dict[str, Any]]


@pytest.fixture(scope="module")
def forecast(checkpoint: Path, path: str) -> Forecast:
    """With forcings, a diagnostic, and a variable that has no value on some cells."""
    return load(checkpoint, path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, forecast: Forecast) -> Exported:
    return export(forecast, tmp_path_factory.mktemp("exported") / "model.pt2")


@pytest.fixture(scope="module")
def loaded(exported: Exported) -> Loaded:
    return read_program(exported.path)


def fields_at(start: str, forecast: Forecast, about: dict[str, Any]) -> Tensor:
    """[1, input time, ensemble, cells, inputs] as they are stored."""
    chosen = open_dataset(forecast.dataset.paths[0], select=about["inputs"])
    last = int(np.searchsorted(chosen.dates, np.datetime64(start, "s")))
    fields = chosen[last + 1 - about["input_steps"] : last + 1]
    return torch.from_numpy(np.ascontiguousarray(fields.transpose(0, 2, 3, 1)))[None]


def check_same(found: Tensor, expected: Tensor, forecast: Forecast) -> None:
    """To 1e-6 of the value, or of the standard deviation where values are near zero; NaN in the same cells."""
    model = forecast.forecaster
    unit = model.stdev[forecast.trained.roles.places(forecast.variables)]
    assert found.shape == expected.shape
    lacking = expected.isnan()
    assert torch.equal(found.isnan(), lacking)
    assert lacking[..., LACKING].any() and lacking.sum() == lacking[..., LACKING].sum()
    assert ((found - expected).abs().le(1e-6 * expected.abs().maximum(unit)) | lacking).all()


def test_a_loaded_program_reproduces_the_first_step_of_the_forecast(forecast: Forecast, loaded: Loaded) -> None:
    program, about = loaded
    fields = fields_at(START, forecast, about)
    assert fields.isnan().any()
    (lead,) = forecast.run(START, "6h")
    with torch.no_grad():
        check_same(program.module()(fields)[0], lead.fields, forecast)


def test_a_program_steps_itself_forward(forecast: Forecast, loaded: Loaded) -> None:
    program, about = loaded
    step, prognostic = program.module(), len(about["prognostic"])
    fields = fields_at(START, forecast, about)
    for lead in forecast.run(START, "18h"):
        with torch.no_grad():
            answer = step(fields)
        check_same(answer[0], lead.fields, forecast)
        forcings = fields_at(str(lead.date), forecast, about)[:, -1, ..., prognostic:]
        newest = torch.cat([lead.fields[None, ..., :prognostic], forcings], dim=-1)
        fields = torch.cat([fields[:, 1:], newest[:, None]], dim=1)


def test_a_program_of_a_dataset_in_compact_order_takes_its_cells_in_that_order(
    forecast: Forecast, checkpoint: Path, path: str, tmp_path: Path
) -> None:
    run(prepare(Request(path, str(tmp_path / "compact.zarr"), 5, order="compact", sync=False)))
    compact = load(checkpoint, tmp_path / "compact.zarr")
    program, about = read_program(export(compact, tmp_path / "model.pt2").path)
    with torch.no_grad():
        answer = program.module()(fields_at(START, compact, about))[0]
    (lead,) = compact.run(START, "6h")
    check_same(answer, lead.fields, compact)
    (native,) = forecast.run(START, "6h")
    (stored,) = compact.dataset.cell_order
    order = stored.values
    assert not np.array_equal(order, np.arange(order.size))
    expected, unit = native.fields[:, order], native.fields.nan_to_num().std(dim=(0, 1))
    assert torch.equal(answer.isnan(), expected.isnan())
    assert ((answer - expected).nan_to_num().abs() / unit).max() < 1e-5


@pytest.mark.parametrize(("batch", "ensemble"), [(1, 1), (3, 1), (1, 5), (2, 3)])
def test_batch_and_ensemble_may_have_any_size(forecast: Forecast, loaded: Loaded, batch: int, ensemble: int) -> None:
    program, about = loaded
    member = fields_at(START, forecast, about)[:, :, :1]
    fields = member.expand(batch, -1, ensemble, -1, -1).contiguous()
    (lead,) = forecast.run(START, "6h", members=1)
    with torch.no_grad():
        answer = program.module()(fields)
    check_same(answer, lead.fields.expand(batch, ensemble, -1, -1), forecast)


def test_a_program_says_how_to_call_it(forecast: Forecast, loaded: Loaded) -> None:
    program, about = loaded
    dataset = forecast.dataset
    assert about["inputs"] == ["t_850", "sst", "q_500", "lsm", "sun"]
    assert about["outputs"] == list(forecast.variables) == ["t_850", "sst", "q_500", "tp"]
    assert about["lacking"] == ["sst"]
    assert (about["input_steps"], about["step_seconds"], about["cells"]) == (2, 21600, dataset.shape[3])
    assert about["checkpoint"] == forecast.trained.digest
    assert torch.equal(program.state_dict["latitudes"], torch.from_numpy(np.array(dataset.latitudes)))
    assert torch.equal(program.state_dict["longitudes"], torch.from_numpy(np.array(dataset.longitudes)))


def test_a_program_holds_nothing_of_this_package_and_no_scatter_of_edges(exported: Exported, loaded: Loaded) -> None:
    program, _ = loaded
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert all(name.startswith("aten.") or "getitem" in name or name.startswith("<built-in") for name in called)
    assert not any("scatter" in name or "index_add" in name for name in called)
    assert exported.nodes < 1500
    input_bytes = 4 * int(np.prod(program.example_inputs[0][0].shape))
    parts = [part.file_size for part in zipfile.ZipFile(exported.path).infolist()]
    assert max(size for size in parts if size < exported.nbytes / 2) < input_bytes, "an example of the input is in it"


def test_grids_of_many_degrees_in_chunks_make_a_program_of_bounded_size(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, dataset_of: Callable[..., str]
) -> None:
    path = dataset_of("irregular")
    forecast = load(trained(tmp_path_factory, path), path, num_chunks=2)
    done = export(forecast, tmp_path / "model.pt2")
    program, about = read_program(done.path)
    (lead,) = forecast.run(START, "6h")
    with torch.no_grad():
        check_same(program.module()(fields_at(START, forecast, about))[0], lead.fields, forecast)
    assert done.nodes < 1500


def test_the_command_writes_what_python_writes(
    tmp_path: Path, path: str, checkpoint: Path, exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--ckpt-path", str(checkpoint), "--dataset", path]
    output = ["--output", str(tmp_path / "a" / "model.pt2")]
    main([*words, *output, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["path"] == output[1] and told["nodes"] == exported.nodes
    assert read_program(output[1])[1] == exported.about
    with pytest.raises(OutputError, match=r"model\.pt2 is there already.*--overwrite"):
        main([*words, *output])
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "model.pt2"]


def test_what_is_no_program_is_refused_by_name(tmp_path: Path, forecast: Forecast, path: str) -> None:
    with pytest.raises(OutputError, match=r"ends in \.pt2"):
        export(forecast, tmp_path / "model.onnx")
    with pytest.raises(DatasetError, match="there is no program"):
        read_program(tmp_path / "model.pt2")
    (tmp_path / "broken.pt2").write_bytes(b"no zip")
    with pytest.raises(DatasetError, match=r"broken\.pt2 is no program"):
        read_program(tmp_path / "broken.pt2")
    half = share_of(FakeComm(0, 2), 2, forecast.dataset)
    two = replace(forecast, share=half)
    with pytest.raises(PlanError, match="cut over 2 ranks"):
        export(two, tmp_path / "model.pt2")


def test_without_a_compiler_the_remedy_is_named(exported: Exported) -> None:
    from torch._inductor import config

    with config.patch("cpp.cxx", ("no-such-compiler",)), pytest.raises(PlanError, match=r"Install g\+\+ or clang\+\+"):
        compile_program(exported.path)
    assert not compiled_path(exported.path).exists()


def test_cpp_reproduces_the_step_of_python(
    forecast: Forecast, exported: Exported, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = [name for name in ("cmake", os.environ.get("CXX", "c++")) if shutil.which(name) is None]
    if absent:
        pytest.skip(f"C++ is tested where there is a toolchain; here there is no {' and no '.join(absent)}")
    compiled = compile_program(exported.path)
    assert compiled == compiled_path(exported.path)

    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    build = tmp_path / "build"
    call("cmake", "-S", EXAMPLE, "-B", build, prefix, "-DCMAKE_BUILD_TYPE=Debug")
    call("cmake", "--build", build)
    files = [tmp_path / name for name in ("fields.f32", "expected.f32")]
    monkeypatch.setattr(sys, "argv", ["fields.py", *map(str, (exported.path, path, START, *files))])
    runpy.run_path(str(EXAMPLE / "fields.py"))
    told = call(build / "step", compiled, files[0], tmp_path / "forecast.f32", files[1])
    assert "t_850,sst,q_500,tp, 21600 s after" in told
    (lead,) = forecast.run(START, "6h")
    written = torch.from_numpy(np.fromfile(tmp_path / "forecast.f32", np.float32)).view_as(lead.fields)
    check_same(written, lead.fields, forecast)

    refused = subprocess.run(
        [build / "step", exported.path, files[0], tmp_path / "x"], capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2 and "is no compiled model" in refused.stderr


def call(*command: str | Path) -> str:
    """What it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
