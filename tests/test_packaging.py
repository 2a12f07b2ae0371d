"""What is published: the files of wheel and source distribution, the declared dependencies, and a wheel at work."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LARGEST_WHEEL = 60 << 20  # bytes; package indexes take up to 100 MB


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command away from the repository: neither its folder nor PYTHONPATH leads there."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=300
    )


def repository_files(folder: str) -> set[str]:
    """Files under a folder of the repository, relative to it, without what Python and tools leave there."""
    paths = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if not any(re.match(r"__pycache__|\.", part) for part in path.parts)}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a folder of its own; torch and the others come from the environment of the tests."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    result = run(*pip, "--target", target, wheel, cwd=target)
    assert result.returncode == 0, result.stdout + result.stderr
    return target


@pytest.mark.slow
def test_wheel_holds_package_and_configuration_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        (metadata,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        scripts = archive.read(f"{metadata}/entry_points.txt").decode()
    expected = {f"ulmfit/{name}" for name in repository_files("src/ulmfit")}
    expected |= {f"ulmfit/conf/{name}" for name in repository_files("conf")}
    assert {name for name in names if not name.startswith(f"{metadata}/")} == expected
    assert {"ulmfit/py.typed", "ulmfit/conf/train.yaml", "ulmfit/samples/train.csv"} <= names
    assert f"{metadata}/licenses/LICENSE" in names
    assert "ulmfit = ulmfit.cli:main" in scripts
    assert wheel.stat().st_size < LARGEST_WHEEL


@pytest.mark.slow
def test_source_distribution_holds_what_tests_need(dist: Path) -> None:
    (path,) = dist.glob("ulmfit-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("src", "conf", "tests"):
        assert {f"{folder}/{name}" for name in repository_files(folder)} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt"} <= names
    assert not [name for name in names if name.startswith((".git/", ".ci/", "runs/", ".venv/"))]


@pytest.mark.slow
@pytest.mark.cli
def test_installed_wheel_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    from ulmfit import __version__

    path = str(installed)
    where = run(sys.executable, "-c", "import ulmfit; print(ulmfit.__file__)", cwd=tmp_path, PYTHONPATH=path)
    assert Path(where.stdout.strip()).is_relative_to(installed)
    version = run(sys.executable, "-m", "ulmfit", "--version", cwd=tmp_path, PYTHONPATH=path)
    assert (version.returncode, version.stdout) == (0, f"ulmfit {__version__}\n")
    for command in ([sys.executable, "-m", "ulmfit"], [installed / "bin" / "ulmfit"]):
        shown = run(*command, "--help", cwd=tmp_path, PYTHONPATH=path)
        assert (shown.returncode, shown.stderr) == (0, "")
        assert "usage: ulmfit VERB" in shown.stdout
    composed = run(sys.executable, "-m", "ulmfit", "train", "--cfg", "job", cwd=tmp_path, PYTHONPATH=path)
    assert composed.returncode == 0, composed.stderr
    assert composed.stdout.startswith("stage:\n  name: all\n")
    assert list(tmp_path.iterdir()) == []


def third_party_imports() -> set[str]:
    """Top-level names of the packages that the source imports anywhere."""
    names = set()
    for path in (ROOT / "src" / "ulmfit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add((node.module or "").partition(".")[0])
    return names - sys.stdlib_module_names - {"ulmfit"}


def declared(table: str) -> set[str]:
    """Normalised names of the distributions listed in pyproject.toml: core, or those of all the extras for users."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if table == "core":
        part = text.partition("\ndependencies = [")[2].partition("\n]")[0]
    else:
        part = text.partition("[project.optional-dependencies]")[2].partition("\ndev = [")[0]
    return {name.lower().replace("_", "-") for name in re.findall(r'"([A-Za-z0-9_-]+)[^"]*[<>=][^"]*"', part)}


def test_imports_and_declared_dependencies_agree() -> None:
    distributions = packages_distributions()
    imported = {
        name: {found.lower().replace("_", "-") for found in distributions.get(name, [name])}
        for name in third_party_imports()
    }
    known = declared("core") | declared("extras")
    assert {name for name, found in imported.items() if not found & known} == set()
    assert declared("core") - set().union(*imported.values()) == set()
