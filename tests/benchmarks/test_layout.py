"""The folders build on each other in one order, and no module leads back to itself."""

import ast
import graphlib
import pathlib
from collections.abc import Iterator

import pytest
from paths import ROOT

FOLDERS = ("inputs", "implementations", "measure", "frameworks", "steps")
"""Each imports only those before it; the commands import all. Only steps know the trainer."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "benchmarks").rglob("*.py")
}


def imports(path: pathlib.Path) -> Iterator[str]:
    """The modules of the benchmarks that a file names, inside of functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


GRAPH = {
    module: {name for name in imports(path) if name in MODULES} for module, path in MODULES.items()
}


def test_no_import_leads_back():
    assert len(GRAPH) > 30
    assert "benchmarks.measure.timing" in GRAPH["benchmarks.tune"]
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())  # CycleError names a circle
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_folder_needs_only_those_before_it(module: str):
    def rank(name: str) -> int:
        folder = name.split(".")[1] if "." in name else ""
        return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)

    later = {name for name in GRAPH[module] if rank(name) > rank(module)}
    assert not later
    # Of the trainer its model and step, which are measured, how a command line is read, and the
    # commands that experiments are made of.
    trainers = module.startswith(
        tuple(f"benchmarks.{name}" for name in ("steps", "paper", "flags", "whole_run"))
    )
    others = ("tests",) if trainers else ("tests", "train")
    assert not any(name.split(".")[0] in others for name in imports(MODULES[module]))
