"""Imports point one way, and the frameworks stay where they belong."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ulmfit

PACKAGE = Path(ulmfit.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Lowest first: a module may import from its own layer's package and from layers below.
CONFIGURATION = {"conf_files", "failures", "arguments", "help_text", "composition_errors", "hydra_config"}
LAYERS = [
    {"errors", "config", "schema", "validation", "durations", "status_line", "ahead"}
    | {"whole_file", "locks", "interruption", "ranks", "memory", "native"},
    {"text", "pickled_data", "shards"},
    {"bundle"},
    {"nn", "optim"},
    {"data", "fastai_weights"},
    {"inference", "plots", "fastai_import"},
    {"generation"},
    {"training"},
    CONFIGURATION,
    {"tasks", "interpret", "export", "hub"},
    {"learner"},
    {"estimator", "serve"},
    {"cli"},
    {"__main__"},
]
PEERS = [LAYERS[0], CONFIGURATION]  # small modules that may import one another
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
WITHOUT_TORCH = {*LAYERS[0], "text", "pickled_data", "cli", "__main__", "__init__", *CONFIGURATION}
HEAVY = {"torch", "lightning", "pandas", "torchmetrics", "matplotlib"}


def area(path: Path) -> str:
    """`nn/awd_lstm.py` -> `nn`, `config.py` -> `config`."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def nodes(tree: ast.AST, deep: bool) -> Iterator[ast.AST]:
    """All nodes, or only those run when the module is imported (not in functions, not for type checking)."""
    for node in ast.iter_child_nodes(tree):
        guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if deep or not (guard or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield node
            yield from nodes(node, deep)


def imports(path: Path, deep: bool = True) -> set[str]:
    """Absolute names of the imported modules; for `from ulmfit import x`, `ulmfit.x`."""
    found: set[str] = set()
    for node in nodes(ast.parse(path.read_text(encoding="utf-8")), deep):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(PACKAGE.parent).parts
            base = ".".join(parts[: -node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "ulmfit" else {module}
    return found


def outside(path: Path, deep: bool = True) -> set[str]:
    """Top-level names of imported packages."""
    return {name.partition(".")[0] for name in imports(path, deep)}


def ids(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", [path for path in FILES if area(path) not in ("__init__", "conf")], ids=ids)
def test_imports_point_one_way(path: Path) -> None:
    own = area(path)
    assert own in RANK, f"{own} has no layer yet: add it to LAYERS"
    for name in imports(path):
        if name.startswith("ulmfit."):
            other = name.split(".")[1]
            lower = RANK.get(other, -1) < RANK[own]
            peers = any({own, other} <= names for names in PEERS)
            assert other == own or lower or peers, f"{ids(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_frameworks_stay_where_they_belong(path: Path) -> None:
    found, own = outside(path), area(path)
    assert "pytorch_lightning" not in found
    if "lightning" in found:
        assert own == "training" or ids(path) == "data/datamodule.py"
    if "hydra" in found or "omegaconf" in found:
        assert own in ("cli", "hydra_config")


@pytest.mark.parametrize("path", [path for path in FILES if area(path) == "nn"], ids=ids)
def test_networks_are_pure_torch(path: Path) -> None:
    allowed = {"nn", "config", "errors", "native"} | ({"bundle"} if path.name == "build.py" else set())
    assert {name.split(".")[1] for name in imports(path) if name.startswith("ulmfit.")} <= allowed
    assert outside(path).isdisjoint({"lightning", "hydra", "omegaconf", "numpy", "pandas", "yaml"})


@pytest.mark.parametrize("path", [path for path in FILES if area(path) in WITHOUT_TORCH], ids=ids)
def test_light_modules_import_nothing_heavy(path: Path) -> None:
    assert outside(path, deep=False).isdisjoint(HEAVY)


@pytest.mark.parametrize("path", [path for path in FILES if area(path) in ("text", "schema", "validation")], ids=ids)
def test_no_torch_even_within_functions(path: Path) -> None:
    assert "torch" not in outside(path)


def test_reading_labels_and_files_needs_no_torch() -> None:
    assert outside(PACKAGE / "data" / "sources.py", deep=False).isdisjoint({"torch", "lightning"})


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nothing_is_pickled(path: Path) -> None:
    assert outside(path).isdisjoint({"pickle", "dill", "cloudpickle", "joblib", "shelve"})
