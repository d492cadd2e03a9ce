"""Who calls a function reads in its docstring which errors it raises."""

import ast
from pathlib import Path

import pytest

import shardio

FILES = sorted(Path(shardio.__file__).parent.rglob("*.py"))


def raised(function):
    """Names of the errors that a function raises itself, or a function inside of it."""
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(error, ast.Name) and error.id.endswith("Error"):
                yield error.id


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(FILES[0].parent)) for file in FILES])
def test_public_functions_name_the_errors_they_raise(file):
    silent = []
    for function in ast.parse(file.read_text()).body:
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
            text = ast.get_docstring(function) or ""
            silent += [f"{function.name}: {name}" for name in raised(function) if name not in text]
    assert silent == []
