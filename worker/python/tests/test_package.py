"""The package as it is installed: its stubs say what is there, and the guide's example runs."""

import ast
import importlib.metadata
import importlib.resources
import inspect
import re
import subprocess
import sys

import pytest
import terrace_kv
from conftest import ROOT, Daemon
from terrace_kv import _native

STUBS = ast.parse(importlib.resources.files(terrace_kv).joinpath("_native.pyi").read_text())
CLASSES = {node.name: node for node in STUBS.body if isinstance(node, ast.ClassDef)}
FUNCTIONS = {node.name: node for node in STUBS.body if isinstance(node, ast.FunctionDef)}


def test_it_is_typed_and_complete() -> None:
    """A name is exported and not there, or the type checker does not find the stubs."""
    assert importlib.resources.files(terrace_kv).joinpath("py.typed").is_file()
    assert all(hasattr(terrace_kv, name) for name in terrace_kv.__all__)
    assert importlib.metadata.version("terrace-kv")
    errors = [getattr(terrace_kv, name) for name in terrace_kv.__all__ if name not in dir(_native)]
    for error in errors:
        if isinstance(error, type) and issubclass(error, Exception):
            assert issubclass(error, terrace_kv.TerraceError)
            assert error.__doc__


def parameters(function: ast.FunctionDef) -> list[str]:
    named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [argument.arg for argument in named if argument.arg != "self"]


@pytest.mark.parametrize("name", [name for name in CLASSES if not name.startswith("_")])
def test_stubs_describe_what_is_there(name: str) -> None:
    """The stubs promise a method or an argument that is not there, or keep one to themselves."""
    real = getattr(_native, name)
    described = {}
    for base in [*CLASSES[name].bases, ast.Name(name)]:
        base_name = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(base_name, ast.Name) and base_name.id in CLASSES:
            body = CLASSES[base_name.id].body
            described |= {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    for method, node in described.items():
        found = inspect.getattr_static(real, method, None) or getattr(real, method, None)
        assert found is not None, f"{name}.{method} is not there"
        if any(isinstance(mark, ast.Name) and mark.id == "property" for mark in node.decorator_list):
            assert inspect.isdatadescriptor(found), f"{name}.{method} is no property"
        elif not method.startswith("__"):
            assert parameters(node) == list(inspect.signature(found).parameters)[1:], f"{name}.{method}"
    public = {method for method in dir(real) if not method.startswith("_")}
    assert public <= set(described)


def test_stubs_describe_the_functions() -> None:
    """As above, for the module."""
    for name, node in FUNCTIONS.items():
        assert parameters(node) == list(inspect.signature(getattr(_native, name)).parameters), name


def test_the_example_of_the_user_guide_runs(daemon: Daemon) -> None:
    """A reader copies the example and it fails: run it as it stands there."""
    guide = (ROOT / "docs" / "user-guide.md").read_text()
    section = guide.split("## From Python")[1].split("\n## ")[0]
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(examples) == 2, "one that blocks and one for asyncio"
    for example in examples:
        command = [sys.executable, "-c", example, str(daemon.socket)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert "tokens in the cache: 32 of 40" in done.stdout
