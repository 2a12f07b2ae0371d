"""The bundle: one directory that holds a model whole, read and written without pickle.

`bundle.json` says what it is, `encoder.safetensors` and `head.safetensors` hold the weights by name, `tokenizer.model`
and `tokenizer.json` the pieces, `README.md` the model card. Every file but `bundle.json` has its checksum in there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulmfit.errors import BundleError
from ulmfit.text.tokenizer import META_FILE, MODEL_FILE, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
INFO_FILE, ENCODER_FILE, HEAD_FILE, CARD_FILE = "bundle.json", "encoder.safetensors", "head.safetensors", "README.md"
FILES = (INFO_FILE, ENCODER_FILE, HEAD_FILE, MODEL_FILE, META_FILE, CARD_FILE)
LANGUAGE_MODEL, CLASSIFIER = "language_model", "classifier"
KINDS = {LANGUAGE_MODEL: "a language model", CLASSIFIER: "a classifier"}


@dataclass
class BundleInfo:
    """What `bundle.json` says.

    Attributes:
        kind: "language_model" or "classifier".
        architecture: `vocab_size`, `embedding_dim`, `hidden_dim`, `num_layers`.
        direction: "forward" or "backward".
        labels: class names in the order of the logits; empty for a language model.
        pooling: classifier only: `bptt`, `max_len`, `head_hidden`.
        provenance: data set, stage, seed, parent bundle, versions: whatever says where the weights come from.
        metrics: validation figures of the weights kept.
    """

    kind: str
    architecture: dict[str, int]
    direction: str = "forward"
    labels: list[str] = field(default_factory=list)
    pooling: dict[str, int] = field(default_factory=dict)
    tokenizer_fingerprint: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass
class Bundle:
    """A loaded bundle: description, float32 weights by name, tokenizer, and where it came from."""

    info: BundleInfo
    encoder: dict[str, Tensor]
    head: dict[str, Tensor]
    tokenizer: Tokenizer
    path: Path


def is_bundle(folder: Path) -> bool:
    """Whether `folder` looks like a bundle."""
    return (folder / INFO_FILE).is_file()


def read_info(folder: Path | str, kind: str | None = None) -> BundleInfo:
    """Read and check `bundle.json` alone; fast, imports no torch.

    Raises:
        BundleError: missing, malformed, of a newer format, or not of `kind`.
    """
    folder = Path(folder)
    path = folder / INFO_FILE
    if not folder.is_dir():
        raise BundleError(f"no bundle at {folder}, expected a folder written by 'ulmfit train'")
    if not path.is_file():
        raise BundleError(f"{folder} holds no {INFO_FILE}, expected a folder written by 'ulmfit train'")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("not an object")
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise BundleError(f"{path} has format {version!r:.20}, this version reads {FORMAT_VERSION}; update ulmfit")
        unknown = values.keys() - {known.name for known in fields(BundleInfo)}
        if unknown or not {"kind", "architecture"} <= values.keys():
            raise ValueError(f"it holds {min(unknown)!r:.40}" if unknown else "kind or architecture is missing")
        info = BundleInfo(**values)
        _check_info(info)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} is not a bundle description ({error}); write the bundle again") from error
    if kind is not None and info.kind != kind:
        raise BundleError(f"{folder} is {KINDS[info.kind]}, expected {KINDS[kind]}; {_how_to_get(kind)}")
    return info


def save_bundle(
    folder: Path | str,
    info: BundleInfo,
    encoder: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    half: bool = False,
) -> Path:
    """Write a bundle, whole or not at all; one that stood there before is replaced, other files beside it stay.

    Args:
        info: its fingerprint and checksums are filled in here.
        half: store weights as float16 (half the size; loading gives float32 again).

    Returns:
        `folder`.

    Raises:
        BundleError: if `folder` holds files but no bundle, or `info` is not valid.
    """
    import torch
    from safetensors.torch import save

    given, folder = Path(folder), Path(folder).resolve()
    if folder.exists() and not is_bundle(folder) and (folder.is_file() or any(folder.iterdir())):
        raise BundleError(
            f"{folder} holds something else than a bundle, expected a new or empty folder; choose another"
        )
    info.tokenizer_fingerprint = tokenizer.fingerprint
    info.metrics = {name: float(value) for name, value in info.metrics.items()}
    try:
        _check_info(info)
    except (ValueError, TypeError) as error:
        raise BundleError(f"a bundle cannot be written to {folder}: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:12]}.partial"
    try:
        partial.mkdir()
        for name, tensors in ((ENCODER_FILE, encoder), (HEAD_FILE, head)):
            dtype = torch.float16 if half else torch.float32
            stored = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in stored.items()}
            (partial / name).write_bytes(save(stored))  # save_file would let nobody else read the file
        tokenizer.save(partial)
        (partial / CARD_FILE).write_text(model_card(info), encoding="utf-8")
        info.checksums = {name: _sha256(partial / name) for name in FILES if name != INFO_FILE}
        (partial / INFO_FILE).write_text(json.dumps(asdict(info), indent=2, default=str) + "\n", encoding="utf-8")
        _replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return given


def load_bundle(folder: Path | str, kind: str | None = None) -> Bundle:
    """Read a bundle and verify its checksums. Nothing in it is executed.

    Raises:
        BundleError: see `read_info`; also for a missing or changed file, and a tokenizer that does not fit.
    """
    from safetensors.torch import load

    folder = Path(folder)
    info = read_info(folder, kind)
    weights: dict[str, dict[str, Tensor]] = {}
    for name in FILES[1:]:
        path = folder / name
        if not path.is_file():
            raise BundleError(f"the bundle {folder} lacks {name}; copy or write it again")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != info.checksums.get(name):
            raise BundleError(f"{path} does not match its checksum in {INFO_FILE}; copy or write the bundle again")
        if name in (ENCODER_FILE, HEAD_FILE):
            try:
                weights[name] = {k: v.float() if v.is_floating_point() else v for k, v in load(content).items()}
            except Exception as error:  # safetensors raises its own, torch others for types it does not know
                raise BundleError(
                    f"{path} is not a safetensors file ({error!s:.200}); write the bundle again"
                ) from error
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != info.tokenizer_fingerprint or tokenizer.vocab_size != info.architecture["vocab_size"]:
        raise BundleError(
            f"the tokenizer in {folder} has {tokenizer.vocab_size} pieces and fingerprint {tokenizer.fingerprint}, "
            f"the encoder expects {info.architecture['vocab_size']} and {info.tokenizer_fingerprint!r:.40}; "
            "they do not belong together"
        )
    encoder, head = weights[ENCODER_FILE], weights[HEAD_FILE]
    if not _weights_may_fill(info, encoder, head):
        raise BundleError(f"the weights in {folder} are fewer than {INFO_FILE} says; copy or write the bundle again")
    return Bundle(info, encoder, head, tokenizer, folder)


def model_card(info: BundleInfo) -> str:
    """The README of a bundle, from its description."""
    origin = info.provenance
    rows = [
        *info.architecture.items(),
        *([("labels", ", ".join(info.labels))] if info.labels else []),
        *((key, value) for key, value in origin.items() if key != "name"),
        *((key, f"{value:.4g}") for key, value in info.metrics.items()),
    ]
    lines = [
        f"# {_cell(origin.get('name', KINDS[info.kind].split(' ', 1)[1].capitalize()))}",
        "",
        f"A ULMFiT {info.kind.replace('_', ' ')} (Howard & Ruder 2018), reading {info.direction}.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {_cell(key).replace('_', ' ')} | {_cell(value)} |" for key, value in rows),
        "",
        "Load it with `ulmfit.load(path)`; weights are safetensors, nothing here is executed.",
    ]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    """One line that does not end its table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _check_info(info: BundleInfo) -> None:
    """Types and ranges, so that a hostile file fails here and not where it is used.

    Raises:
        ValueError: naming the field.
    """
    if not isinstance(info.kind, str) or info.kind not in KINDS:
        raise ValueError(f"kind is {info.kind!r:.60}")
    sizes = ("vocab_size", "embedding_dim", "hidden_dim", "num_layers")
    if not isinstance(info.architecture, dict) or set(info.architecture) != set(sizes):
        raise ValueError(f"architecture must hold {', '.join(sizes)}")
    limits = (10_000_000, 65_536, 65_536, 64)
    for name, limit in zip(sizes, limits, strict=True):
        _check_size(name, info.architecture[name], limit)
    if info.direction not in ("forward", "backward"):
        raise ValueError(f"direction is {info.direction!r:.60}")
    for name in ("provenance", "metrics", "checksums", "pooling"):
        if not isinstance(getattr(info, name), dict):
            raise ValueError(f"{name} is not an object")
    for name, figure in info.metrics.items():
        if not isinstance(figure, float) and not (isinstance(figure, int) and abs(figure) < 1 << 63):
            raise ValueError(f"metrics.{name:.60} is {figure!r:.60}")
    if not isinstance(info.labels, list) or not all(isinstance(label, str) for label in info.labels):
        raise ValueError("labels is not a list of strings")
    if len(set(info.labels)) < len(info.labels):
        raise ValueError("a label stands twice in labels")
    if info.kind == CLASSIFIER:
        if len(info.labels) < 2:
            raise ValueError("a classifier needs two labels or more")
        for name in ("bptt", "max_len", "head_hidden"):
            _check_size(f"pooling.{name}", info.pooling.get(name), 10_000_000)
    # Raises UnicodeEncodeError, a ValueError, for lone surrogates, which could not be printed.
    json.dumps(asdict(info), ensure_ascii=False, default=str).encode()


def _check_size(name: str, value: object, limit: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
        raise ValueError(f"{name} is {value!r:.60}")


def _weights_may_fill(info: BundleInfo, encoder: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> bool:
    """Whether the files hold enough numbers for what `info` promises, so that a lie allocates nothing."""
    size = info.architecture
    width, hidden = size["embedding_dim"], size["hidden_dim"]
    least = size["vocab_size"] * width + (size["num_layers"] - 1) * 4 * hidden * hidden
    least_head = info.pooling["head_hidden"] * 3 * width if info.kind == CLASSIFIER else 0
    return sum(v.numel() for v in encoder.values()) >= least and sum(v.numel() for v in head.values()) >= least_head


def _how_to_get(kind: str) -> str:
    stage = "classifier" if kind == CLASSIFIER else "lm_finetune"
    return f"make one with 'ulmfit train stage={stage}'"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _replace_folder(new: Path, final: Path) -> None:
    """Put `new` in the place of `final`; a reader finds the old or the new one (but for an instant between renames)."""
    if not final.exists():
        os.replace(new, final)
        return
    old = final.parent / f".{final.name}.{uuid.uuid4().hex[:12]}.old"
    os.replace(final, old)
    try:
        os.replace(new, final)
    except BaseException:
        os.replace(old, final)
        raise
    for other in old.iterdir():
        if other.name not in FILES:
            os.replace(other, final / other.name)
    shutil.rmtree(old, ignore_errors=True)
