"""The bundle: one directory that holds a model whole, read and written without pickle.

`bundle.json` says what it is, `encoder.safetensors` and `head.safetensors` hold the weights by name, `tokenizer.model`
and `tokenizer.json` the pieces, `README.md` the model card. Every file has its
checksum in there; that of `bundle.json` is over everything else it says.
A large encoder may be in shards instead (`shards.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulmfit.errors import BundleError
from ulmfit.shards import cut, expected_shards, is_shard, joined, shard_names
from ulmfit.text.tokenizer import META_FILE, MODEL_FILE, Tokenizer
from ulmfit.whole_file import partial_folder, put_folder, read_small, sha256_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT_VERSION = 1
INFO_FILE, ENCODER_FILE, HEAD_FILE, CARD_FILE = "bundle.json", "encoder.safetensors", "head.safetensors", "README.md"
FILES = (INFO_FILE, ENCODER_FILE, HEAD_FILE, MODEL_FILE, META_FILE, CARD_FILE)
LANGUAGE_MODEL, CLASSIFIER = "language_model", "classifier"
_MOST_TEXT = 256 << 20  # bytes of a description, a card, a tokenizer, and of the names in a file of weights
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

    @property
    def encoder_files(self) -> list[str]:
        """The file of the encoder's weights, or its shards in order."""
        return expected_shards(self.checksums) or [ENCODER_FILE]

    @property
    def files(self) -> list[str]:
        """Every file of the bundle."""
        return [INFO_FILE, *self.encoder_files, *(name for name in FILES if name not in (INFO_FILE, ENCODER_FILE))]


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
        values = json.loads(read_small(path, _MOST_TEXT).decode())
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
        others = info.checksums.keys() - set(info.files)
        if others:
            raise ValueError(f"checksums hold {min(others)!r:.60}")
        if info.checksums.get(INFO_FILE, _own_checksum(values)) != _own_checksum(values):  # older ones have none
            raise BundleError(f"{path} does not match its own checksum; copy or write the bundle again")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BundleError(f"{path} is not a bundle description ({error}); write the bundle again") from error
    if kind is not None and info.kind != kind:
        raise BundleError(f"{folder} is {KINDS[info.kind]}, expected {KINDS[kind]}; {_how_to_get(kind)}")
    return info


def check_place(folder: Path) -> None:
    """See that a bundle may be written to `folder`.

    Raises:
        BundleError: it is a file, or holds files but no bundle.
    """
    if folder.exists() and not is_bundle(folder) and (folder.is_file() or any(folder.iterdir())):
        raise BundleError(
            f"{folder} holds something else than a bundle, expected a new or empty folder; choose another"
        )


def save_bundle(
    folder: Path | str,
    info: BundleInfo,
    encoder: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    half: bool = False,
    shard_mib: int | None = None,
) -> Path:
    """Write a bundle, whole or not at all; one that stood there before is replaced, other files beside it stay.

    Args:
        info: its fingerprint and checksums are filled in here.
        half: store weights as float16 (half the size; loading gives float32 again).
        shard_mib: store the encoder in files of at most so many MiB.

    Returns:
        `folder`.

    Raises:
        BundleError: if `folder` holds files but no bundle, or `info` is not valid.
    """
    import torch
    from safetensors.torch import save

    given, folder = Path(folder), Path(folder).resolve()
    check_place(folder)
    info.tokenizer_fingerprint = tokenizer.fingerprint
    info.metrics = {name: float(value) for name, value in info.metrics.items()}
    try:
        _check_info(info)
    except (ValueError, TypeError) as error:
        raise BundleError(f"a bundle cannot be written to {folder}: {error}") from error
    with partial_folder(folder) as partial:
        dtype = torch.float16 if half else torch.float32
        stored = _stored(encoder, dtype)
        shards = [stored] if shard_mib is None else cut(stored, shard_mib << 20)
        names = [ENCODER_FILE] if shard_mib is None else shard_names(len(shards))
        for name, tensors in zip([*names, HEAD_FILE], [*shards, _stored(head, dtype)], strict=True):
            (partial / name).write_bytes(save(tensors))  # save_file would let nobody else read the file
        tokenizer.save(partial)
        (partial / CARD_FILE).write_text(model_card(info), encoding="utf-8")
        info.checksums = {path.name: sha256_of(path) for path in sorted(partial.iterdir())}
        values = json.loads(json.dumps(asdict(info), default=str))
        info.checksums[INFO_FILE] = values["checksums"][INFO_FILE] = _own_checksum(values)
        (partial / INFO_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        put_folder(partial, folder, stays=lambda name: name not in FILES and not is_shard(name))
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
    for name in info.files[1:]:
        path = folder / name
        if not path.is_file():
            raise BundleError(f"the bundle {folder} lacks {name}; copy or write it again")
        try:
            content = read_small(path, _most_bytes(info, name))
        except ValueError as error:
            raise BundleError(f"{path} does not belong to this bundle ({error}); copy or write it again") from error
        if hashlib.sha256(content).hexdigest() != info.checksums.get(name):
            raise BundleError(f"{path} does not match its checksum in {INFO_FILE}; copy or write the bundle again")
        if name in (*info.encoder_files, HEAD_FILE):
            try:
                weights[name] = {k: v.float() if v.is_floating_point() else v for k, v in load(content).items()}
            except MemoryError:
                raise
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
    head = weights[HEAD_FILE]
    try:
        encoder = joined([weights[name] for name in info.encoder_files])
    except RuntimeError as error:
        raise BundleError(f"the shards in {folder} do not fit together ({error!s:.200}); write it again") from error
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


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What a file holds: weights in the precision asked for, counts as they are."""
    cpu = {name: v.detach().cpu().contiguous() for name, v in tensors.items()}
    return {name: v.to(dtype) if v.is_floating_point() else v for name, v in cpu.items()}


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
    shards = set(filter(is_shard, info.checksums))
    if shards and (shards != set(expected_shards(shards)) or ENCODER_FILE in info.checksums):
        raise ValueError("checksums name files of an encoder that do not make one")
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


def _most_bytes(info: BundleInfo, name: str) -> int:
    """How large a file of the bundle can be, generously: what is larger is not read."""
    if name not in (*info.encoder_files, HEAD_FILE):
        return _MOST_TEXT
    size = info.architecture
    wide = max(size["embedding_dim"], size["hidden_dim"])
    head_hidden = info.pooling["head_hidden"] if info.kind == CLASSIFIER else 0
    numbers = size["vocab_size"] * (size["embedding_dim"] + 1) + size["num_layers"] * 8 * wide * (wide + 2)
    return 16 * (numbers + head_hidden * (3 * wide + len(info.labels))) + _MOST_TEXT


def _how_to_get(kind: str) -> str:
    stage = "classifier" if kind == CLASSIFIER else "lm_finetune"
    return f"make one with 'ulmfit train stage={stage}'"


def _own_checksum(values: Mapping[str, Any]) -> str:
    """Of what `bundle.json` says, however it is laid out, but for this checksum itself."""
    sums = {name: value for name, value in values.get("checksums", {}).items() if name != INFO_FILE}
    content = json.dumps({**values, "checksums": sums}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()
