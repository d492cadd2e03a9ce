"""What users get: the wheel's contents, a light import, and the command's version."""

import ast
import json
import subprocess
import sys
import sysconfig
import tomllib
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def run(*command: str | Path) -> str:
    """Run `command` and return its stdout; its stderr is shown when it fails."""
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out)
    with ZipFile(out / f"shardio-{VERSION}-py3-none-any.whl") as wheel:
        return set(wheel.namelist())


def test_wheel_holds_both_packages_and_the_type_marker(wheel_files: set[str]) -> None:
    assert {"shardio/__init__.py", "shardio/py.typed", "trainer/__init__.py"} <= wheel_files


def test_wheel_holds_the_license(wheel_files: set[str]) -> None:
    assert f"shardio-{VERSION}.dist-info/licenses/LICENSE" in wheel_files


def test_wheel_holds_nothing_else(wheel_files: set[str]) -> None:
    folders = {name.split("/")[0] for name in wheel_files}
    assert folders == {"shardio", "trainer", f"shardio-{VERSION}.dist-info"}


def test_import_shardio_loads_no_heavy_library() -> None:
    code = "import json, sys, shardio; print(json.dumps(list(sys.modules)))"
    loaded = set(json.loads(run(sys.executable, "-W", "error", "-c", code)))
    assert "shardio" in loaded
    assert not loaded & {"torch", "dask", "distributed", "xarray", "zarr", "tensorstore"}


def test_messages_between_ranks_leave_through_one_file() -> None:
    """Beside it: watching over ranks needs their store, and `shardio` its own exchange of what ranks read."""
    knows = {"trainer/comm.py", "trainer/ranks/failure.py", "shardio/load/redistribute.py"}
    files = [path for package in ("shardio", "trainer") for path in (ROOT / package).rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in files if "torch.distributed" in _imports(path)} == knows


def _imports(path: Path) -> set[str]:
    """Modules that a file imports to run, not only to check types."""
    lines = ast.parse(path.read_text()).body
    found = {name for node in lines for name in _of(node)}
    return found | {
        name for node in lines if isinstance(node, ast.FunctionDef) for one in ast.walk(node) for name in _of(one)
    }


def _of(node: ast.AST) -> set[str]:
    if isinstance(node, ast.ImportFrom):
        return {node.module or "", *(f"{node.module}.{name.name}" for name in node.names)}
    return {name.name for name in node.names} if isinstance(node, ast.Import) else set()


def test_version_is_the_same_everywhere() -> None:
    command = Path(sysconfig.get_path("scripts")) / "shardio"
    assert VERSION in run(command, "--version").split()
    assert run(sys.executable, "-c", "import shardio; print(shardio.__version__)").strip() == VERSION


@pytest.mark.parametrize("package", ["shardio", "trainer"])
def test_type_checkers_find_every_public_name_where_it_is(package: str) -> None:
    """At run time `__getattr__` fetches them, of which a type checker knows nothing."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    typed = {name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    module = import_module(package)
    assert typed == {name: f"{package}.{home}" for name, home in module._HOMES.items()}
    assert set(typed) == set(module.__all__) - {"__version__"}
