"""Other people's files: at each place where one is read, a program in it stays a text."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import ulmfit
from ulmfit.cli import main
from ulmfit.config import DatasetConfig, TokenizerConfig
from ulmfit.data.cache import TokenCache, build_token_cache
from ulmfit.data.huggingface import open_huggingface
from ulmfit.data.packed import pack, unpack
from ulmfit.data.sources import load_splits, read_table
from ulmfit.errors import UlmfitError
from ulmfit.fastai_import import read_fastai_vocabulary
from ulmfit.fastai_weights import read_fastai_checkpoint
from ulmfit.tasks.run_folder import read_record
from ulmfit.text.tokenizer import Tokenizer
from ulmfit.training.checkpoints import WholeFiles

PACKAGE = Path(ulmfit.__file__).parent


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def pickled(trace: Path) -> bytes:
    return pickle.dumps([Canary(trace)], protocol=2)


def array(trace: Path) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([Canary(trace)], dtype=object), allow_pickle=True)
    return content.getvalue()


def checkpoint(trace: Path) -> bytes:
    content = io.BytesIO()
    torch.save({"state_dict": {"0.encoder.weight": Canary(trace)}, "pytorch-lightning_version": "2.6.0"}, content)
    return content.getvalue()


def old_checkpoint(trace: Path) -> bytes:
    content = io.BytesIO()
    torch.save({"state_dict": Canary(trace)}, content, _use_new_zipfile_serialization=False)
    return content.getvalue()


def tagged(trace: Path) -> bytes:
    return f"!!python/object/apply:os.mkdir ['{trace}']\n".encode()


PROGRAMS = {
    "pickle": pickled,
    "array": array,
    "checkpoint": checkpoint,
    "old checkpoint": old_checkpoint,
    "YAML": tagged,
}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


def test_the_programs_do_run_where_nobody_is_careful(trace: Path, tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "x"
    readers: dict[str, Callable[[], object]] = {
        "pickle": lambda: pickle.loads(path.read_bytes()),
        "array": lambda: np.load(path, allow_pickle=True),
        "checkpoint": lambda: torch.load(path, weights_only=False),
        "old checkpoint": lambda: torch.load(path, weights_only=False),
        "YAML": lambda: yaml.unsafe_load(path.read_text()),
    }
    for name, program in PROGRAMS.items():
        path.write_bytes(program(trace))
        readers[name]()
        assert trace.exists(), name
        trace.rmdir() if trace.is_dir() else trace.unlink()


def read_cache(path: Path, tmp_path: Path) -> None:
    """As each of the three files of a token cache."""
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 9, TokenizerConfig(vocab_size=300))
    build_token_cache(iter(["the cat", "a mat"]), tokenizer, tmp_path / "tokens", "0" * 32, workers=1)
    (folder,) = (tmp_path / "tokens").iterdir()
    for name in ("meta.json", "offsets.bin", "tokens.bin"):
        whole = (folder / name).read_bytes()
        shutil.copyfile(path, folder / name)
        with pytest.raises(UlmfitError):
            TokenCache.open(folder, tokenizer.vocab_size)
        (folder / name).write_bytes(whole)
    raise UlmfitError


def read_tokenizer(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    Tokenizer.train(["the cat sat on the mat"] * 9, TokenizerConfig(vocab_size=300)).save(folder)
    shutil.copyfile(path, folder / "tokenizer.json")
    with pytest.raises(UlmfitError):
        Tokenizer.load(folder)
    shutil.copyfile(path, folder / "tokenizer.model")
    Tokenizer.load(folder)


def data(suffix: str, **settings: Any) -> Callable[[Path, Path], None]:
    def read(path: Path, tmp_path: Path) -> None:
        file = path.rename(tmp_path / f"d{suffix}")
        for label in ("label", None):
            read_table(file, label=label, **settings)
        load_splits(DatasetConfig(path=str(file), **settings))

    return read


def read_as(suffix: str, reader: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    def read(path: Path, tmp_path: Path) -> None:
        reader(path.rename(tmp_path / f"x{suffix}"))

    return read


def folder_of_classes(path: Path, tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "test/a"):
        (tmp_path / "f" / name).mkdir(parents=True)
        shutil.copyfile(path, tmp_path / "f" / name / "1.txt")
    load_splits(DatasetConfig(path=str(tmp_path / "f")))


def packed(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    shutil.copyfile(path, folder / "manifest.json")
    unpack(folder, tmp_path / "unpacked")


PLACES: dict[str, Callable[[Path, Path], None]] = {
    "CSV": data(".csv"),
    "TSV": data(".tsv"),
    "JSON lines": data(".jsonl"),
    "parquet": data(".parquet"),
    "plain text": data(".txt", encoding="latin-1"),
    "compressed": data(".csv.gz"),
    "folder of classes": folder_of_classes,
    "token cache": read_cache,
    "tokenizer": read_tokenizer,
    "packed corpus": packed,
    "recovery checkpoint": lambda path, _: WholeFiles().load_checkpoint(path, map_location="cpu", weights_only=True),
    "fastai checkpoint": lambda path, _: read_fastai_checkpoint(path),
    "vocabulary .pkl": read_as(".pkl", read_fastai_vocabulary),
    "vocabulary .json": read_as(".json", read_fastai_vocabulary),
    "figures of a run": read_as(".json", read_record),
    "settings of a run": read_as(".yaml", read_record),
}

TEXTS = ("plain text", "folder of classes")  # where a program may be a text like others


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_in_a_file_is_not_run(place: str, program: str, trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(PROGRAMS[program](trace))
    with suppress(UlmfitError) if place in TEXTS else pytest.raises(UlmfitError):
        PLACES[place](path, tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", ".."])
def test_a_packed_corpus_reaches_no_file_outside(name: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 9, TokenizerConfig(vocab_size=300))
    build_token_cache(iter(["the cat", "a mat"]), tokenizer, tmp_path / "tokens", "0" * 32, workers=1)
    (cache,) = (tmp_path / "tokens").iterdir()
    folder = tmp_path / "packed"
    pack(folder, tokenizer, {"train": cache}, 10**7)
    unpack(folder, tmp_path / "fine")
    (tmp_path / "secret").write_text("x")
    whole = json.loads((folder / "manifest.json").read_text())
    (part,) = whole["arrays"]["train/tokens.bin"]["parts"]
    for old, new in ((part, name), ("train/tokens.bin", name)):
        (folder / "manifest.json").write_text(json.dumps(whole).replace(json.dumps(old), json.dumps(new)))
        with pytest.raises(UlmfitError):
            unpack(folder, tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists() or not any((tmp_path / "unpacked").rglob("*.bin"))


def test_an_arrow_extension_type_is_not_unpickled(trace: Path, tmp_path: Path) -> None:
    """pyarrow before 14.0.1 did that while it read a schema (CVE-2023-47248)."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickled(trace)}
    schema = pyarrow.schema([pyarrow.field("text", pyarrow.string(), metadata=metadata)])
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}, schema), tmp_path / "d.parquet")
    read_table(tmp_path / "d.parquet")
    assert not trace.exists()


def test_a_run_does_not_resume_from_a_program(
    trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the real command, with the checkpoint where it looks for one."""
    monkeypatch.chdir(tmp_path)
    Path("d.txt").write_text("the cat sat on the mat\n" * 60)
    small = ["model=tiny", "tokenizer.vocab_size=300", "trainer=cpu", "trainer.threads=1", "stage.lm.max_steps=2"]
    words = ["train", "stage=lm_finetune", "init=scratch", "dataset.path=d.txt", "cache=c", *small]

    def end(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # a run that is left with its log and no figures
        patch.setattr("ulmfit.tasks.stages.save_bundle", end)
        main(words)
    (folder,) = (tmp_path / "runs" / "d").iterdir()
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(exist_ok=True)
    for program in (checkpoint, old_checkpoint, pickled):
        path.write_bytes(program(trace))
        capsys.readouterr()
        assert main(words) == 2
        assert "last.ckpt is no checkpoint to go on from" in capsys.readouterr().err
        assert not trace.exists()


def test_configuration_files_of_others_run_nothing(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (
        tagged(trace).decode(),
        f"# @package _global_\nseed: {tagged(trace).decode()}",
        "# @package _global_\nstage:\n  lm:\n    optim:\n      _target_: pathlib.Path.touch\n",
    ):
        (tmp_path / "experiment").mkdir(exist_ok=True)
        (tmp_path / "experiment" / "evil.yaml").write_text(content)
        assert main(["train", "experiment=evil", "--config-dir", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("ulmfit: ")
    assert not trace.exists()


def test_a_report_runs_nothing(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "runs" / "d" / "all-01234567-seed0"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text('{"seconds": 1}')
    (run / "config.yaml").write_bytes(b"seed: " + tagged(trace))
    assert main(["report", f"runs={tmp_path / 'runs'}"]) == 2
    assert "config.yaml cannot be read" in capsys.readouterr().err
    assert not trace.exists()


def test_data_sets_of_the_hub_may_bring_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` before version 4 runs the script of a data set unless this switch is off."""
    seen: list[Any] = []
    config = SimpleNamespace(HF_DATASETS_TRUST_REMOTE_CODE=True)

    def load(*_: object) -> dict[str, Any]:
        seen.append(config.HF_DATASETS_TRUST_REMOTE_CODE)
        return {"train": None}

    library = SimpleNamespace(config=config, load_dataset=load, load_from_disk=load)
    monkeypatch.setitem(sys.modules, "datasets", library)  # type: ignore[arg-type]
    open_huggingface.cache_clear()
    for path in ("hf:somebody/something", "a-folder"):
        open_huggingface(path)
    open_huggingface.cache_clear()
    assert seen == [False, False]


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
def test_a_script_beside_a_data_set_is_not_run(trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "evil.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n")
    with pytest.raises(UlmfitError):
        open_huggingface("hf:./evil")
    assert not trace.exists()


# ---------------------------------------------------------------------------------------------- by reading the code

UNSAFE = {
    "eval", "exec", "np.load", "numpy.load", "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all",
    "os.system", "shutil.unpack_archive", "tarfile.open",
}  # fmt: skip
UNSAFE_METHODS = {"extract", "extractall", "unsafe_load"}
# Reads the members of archives whose SHA-256 is known, one after the other, and writes none of them to the disk.
ALLOWED = {("data/published.py", "tarfile.open")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_call_that_could_run_a_file_or_unpack_an_archive(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (path.relative_to(PACKAGE).as_posix(), name) not in ALLOWED:
            assert name not in UNSAFE, f"line {node.lineno}"
        assert name.rpartition(".")[2] not in UNSAFE_METHODS, f"line {node.lineno}"
        assert settings.get("shell") != "True", f"line {node.lineno}"
        assert settings.get("allow_pickle", "False") == "False", f"line {node.lineno}"
        if name == "torch.load":
            assert settings.get("weights_only") == "True", f"line {node.lineno}"


def test_the_run_folders_record_is_plain_json(tmp_path: Path) -> None:
    """What a run writes, it can read back: nothing needs more than names, texts and numbers."""
    from ulmfit.config import TrainConfig
    from ulmfit.tasks.run_folder import write_config

    path = write_config(TrainConfig(), tmp_path)
    assert json.loads(json.dumps(read_record(path))) == read_record(path)
