"""A tokenised corpus as a few files of limited size with checksums, to be carried to a machine that trains on it.

A packed folder holds the tokenizer, `manifest.json`, and each array of the token caches of the training and validation
texts as `.xz` files one after the other. The parts may arrive one by one; unpacking wants them all.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ulmfit.ahead import in_order
from ulmfit.config import DatasetConfig
from ulmfit.data.cache import TokenCache
from ulmfit.data.unpacking import XZ
from ulmfit.errors import BundleError, DataError
from ulmfit.text.tokenizer import META_FILE, MODEL_FILE, Tokenizer
from ulmfit.whole_file import partial_folder, put_folder, read_small, sha256_of, whole_file

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "valid")
CACHE_FILES = ("meta.json", "offsets.bin", "tokens.bin")
_BLOCK = 8 << 20  # bytes compressed at a time
# Ids are two bytes wide: contexts that know the position in a pair save a tenth.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1}]


@dataclass(frozen=True)
class Packed:
    """An unpacked corpus; `valid` is None if it had no validation text."""

    tokenizer: Tokenizer
    train: TokenCache
    valid: TokenCache | None
    dataset: str
    licence: str


def pack(
    folder: Path,
    tokenizer: Tokenizer,
    caches: Mapping[str, Path],
    part_bytes: int,
    dataset: str = "",
    licence: str = "",
) -> dict[str, Any]:
    """Write caches and their tokenizer into `folder`.

    Args:
        caches: folders of `build_token_cache` for `train` and perhaps `valid`.
        part_bytes: no file is larger.
        dataset: name of the data set, for the cards of models.
        licence: of the text, likewise.

    Returns:
        The manifest.

    Raises:
        DataError: `folder` holds something already, or parts are too small for a block.
    """
    check_output(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    files = {name: {"sha256": sha256_of(folder / name)} for name in (MODEL_FILE, META_FILE)}
    arrays: dict[str, Any] = {}
    for split, cache in caches.items():
        for name in CACHE_FILES:
            parts, digest, size = _compress(cache / name, folder, f"{split}.{name.partition('.')[0]}", part_bytes)
            arrays[f"{split}/{name}"] = {"sha256": digest, "bytes": size, "parts": parts}
            files |= {part: {"sha256": sha256_of(folder / part)} for part in parts}
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": tokenizer.fingerprint,
        "dataset": dataset,
        "licence": licence,
        "files": {name: {**about, "bytes": (folder / name).stat().st_size} for name, about in files.items()},
        "arrays": arrays,
    }
    with whole_file(folder / MANIFEST) as partial:  # last: a folder without it is not complete
        partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def check_output(folder: Path) -> None:
    """Raises DataError for a folder that holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} holds something already, expected a new or empty folder; choose another output")


def is_packed(config: DatasetConfig) -> bool:
    """Whether a data set is what `ulmfit pack` wrote."""
    return config.format == "packed"


def packed_key(folder: Path) -> str:
    """Names the content of a packed folder. Raises DataError as `unpack`."""
    return hashlib.sha256(json.dumps(_manifest(folder), sort_keys=True).encode()).hexdigest()


def unpack(folder: Path, target: Path) -> Packed:
    """The corpus of a packed folder, unpacked below `target` unless it is there already. Every byte is checked.

    Raises:
        DataError: no packed folder, a part that is missing or damaged, or caches that do not fit the tokenizer.
    """
    manifest = _manifest(folder)
    final = target / packed_key(folder)[:32]
    if not final.is_dir():
        _check_files(folder, manifest)
        with partial_folder(final) as partial:
            for name in (MODEL_FILE, META_FILE):
                shutil.copyfile(folder / name, partial / name)
            for name, about in manifest["arrays"].items():
                _decompress(folder, about, partial / name)
            if not final.exists():  # otherwise another process was faster
                put_folder(partial, final)
    try:
        tokenizer = Tokenizer.load(final)
    except BundleError as error:
        raise DataError(f"{folder} holds a tokenizer that cannot be read ({error}); pack it again") from error
    if tokenizer.fingerprint != manifest["fingerprint"]:
        raise DataError(f"{folder} holds another tokenizer than {MANIFEST} says; pack it again")
    caches = {
        split: TokenCache.open(final / split, tokenizer.vocab_size) for split in SPLITS if (final / split).is_dir()
    }
    dataset, licence = (str(manifest.get(name, "")) for name in ("dataset", "licence"))
    return Packed(tokenizer, caches["train"], caches.get("valid"), dataset, licence)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(read_small(path, 16 << 20))
        if manifest["format_version"] != FORMAT_VERSION:
            raise ValueError("it was written by another version")
        known = {f"{split}/{name}" for split in SPLITS for name in CACHE_FILES}
        arrays, files = manifest["arrays"], manifest["files"]
        if not {f"train/{name}" for name in CACHE_FILES} <= set(arrays) <= known:
            raise ValueError("its arrays are not those of a corpus")
        parts = [part for about in arrays.values() for part in about["parts"]]
        if set(files) != {MODEL_FILE, META_FILE, *parts} or any(Path(name).name != name for name in files):
            raise ValueError("its files are not those of its arrays")
        if not all(isinstance(about["bytes"], int) for about in (*files.values(), *arrays.values())):
            raise ValueError("a size is missing")
    except FileNotFoundError:
        raise DataError(f"{folder} holds no {MANIFEST}, expected a folder written by 'ulmfit pack'") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a list of packed files ({error}); copy it or pack again") from error
    return dict(manifest)


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    missing = [name for name in manifest["files"] if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing[:5])}; copy all files that {MANIFEST} names")
    for name, about in manifest["files"].items():
        if sha256_of(folder / name) != about["sha256"]:
            raise DataError(f"{folder / name} does not match its checksum in {MANIFEST}; copy it again")


def _compress(source: Path, folder: Path, stem: str, part_bytes: int) -> tuple[list[str], str, int]:
    """The parts written, the checksum of `source` and its size."""
    names: list[str] = []
    digest = hashlib.sha256()
    size = left = 0
    for raw, packed in _compressed_blocks(source):
        digest.update(raw)
        size += len(raw)
        if len(packed) > part_bytes:
            raise DataError(f"part_mb is too small for a block of {len(packed)} bytes; give at least 9")
        if len(packed) > left or not names:
            names.append(f"{stem}-{len(names):03}.xz")
            left = part_bytes
        with (folder / names[-1]).open("ab") as out:  # several .xz streams in a row are one .xz file
            out.write(packed)
        left -= len(packed)
    return names, digest.hexdigest(), size


def _compressed_blocks(source: Path) -> Iterator[tuple[bytes, bytes]]:
    """Blocks of a file in order, raw and compressed; as many at a time as there are cores."""
    workers = os.cpu_count() or 1
    with source.open("rb") as file, ThreadPoolExecutor(workers) as pool:  # lzma works without Python's lock

        def compress(block: bytes) -> tuple[bytes, bytes]:
            return block, lzma.compress(block, lzma.FORMAT_XZ, -1, None, _FILTERS)

        blocks = iter(lambda: file.read(_BLOCK), b"")
        yield from in_order(lambda block: pool.submit(compress, block), blocks, workers)


def _decompress(folder: Path, about: dict[str, Any], target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    digest = hashlib.sha256()
    size = 0
    with target.open("wb") as out:
        for part in about["parts"]:
            try:
                with (folder / part).open("rb") as packed:
                    stream = XZ(packed)
                    while block := stream.read(1 << 20):
                        size += len(block)
                        if size > about["bytes"]:
                            raise lzma.LZMAError("it unpacks to more than it should")
                        digest.update(block)
                        out.write(block)
            except (lzma.LZMAError, EOFError) as error:
                raise DataError(f"{folder / part} cannot be unpacked ({error}); copy it again") from error
    if digest.hexdigest() != about["sha256"]:
        raise DataError(f"{folder} does not unpack to what {MANIFEST} says of {target.name}; pack it again")
