"""What identifies the texts of a data set, and how much of it there is, mostly without reading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import islice
from typing import Any

from ulmfit.config import DatasetConfig
from ulmfit.data.files import CHUNK, read_lines, require_path, sample_bytes
from ulmfit.data.locate import SPLITS, Located, check_split, drawn_share, held_out, locate, source_files
from ulmfit.data.rows import text_columns
from ulmfit.data.wikitext import raw_articles, words_and_ends

READING_VERSION = 1  # part of the content key: raise it when the same files give other texts
SAMPLE_BYTES = 4 << 20


def content_key(config: DatasetConfig, split: str) -> str:
    """A sha256 that changes whenever `iter_texts(config, split)` would give other texts.

    It covers the bytes of the files read and the settings that matter, not where the files lie.
    """
    check_split(split)
    found = locate(config)
    digest = hashlib.sha256()
    settings: dict[str, Any] = {
        "version": READING_VERSION,
        "split": split,
        "text": text_columns(config),
        "encoding": config.encoding,
        "delimiter": config.delimiter,
        "limit": config.limit,
    }
    # The label decides a stratified split, a limit and a low-shot sample.
    if config.limit is not None or split in ("train", "lm") or not found.of(split):
        drawn = {name: drawn_share(found, config, name) for name in ("valid", "test")}
        settings |= {"label": config.label, "seed": config.split_seed, "drawn": drawn}
    if split == "train":
        settings |= {"train_size": config.train_size, "train_seed": config.train_seed}
    if split == "lm":
        settings["lm_use_test"] = config.lm_use_test
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name in _read_for(found, config, split):
        for source in found.of(name):
            digest.update(f"\0{name}\0{source.format}\0{source.part}\0".encode())
            if source.format == "huggingface" and not source.path.exists():
                from ulmfit.data.huggingface import fingerprint

                digest.update(fingerprint(source).encode())
                continue
            for path in source_files(source):
                label = f"{path.relative_to(source.path)}\0" if source.format == "folder" else ""
                digest.update(f"{label}{path.stat().st_size}\0".encode())
                with path.open("rb") as file:
                    while block := file.read(CHUNK):
                        digest.update(block)
    return digest.hexdigest()


def total_bytes(config: DatasetConfig, split: str) -> int | None:
    """About how many bytes of text `iter_texts(config, split)` gives; None for Hugging Face data sets.

    Exact for whole uncompressed text files; compressed ones are judged by how their first four megabytes unpack.
    """
    return _estimate(config, split, lambda data: len(data))


def total_chars(config: DatasetConfig, split: str) -> int | None:
    """As `total_bytes`, in characters."""
    return _estimate(config, split, lambda data: len(data.decode(config.encoding, "ignore")))


def word_count(config: DatasetConfig, split: str) -> int | None:
    """Words of the documents of `iter_texts(config, split)` and ends of their lines, as the raw files have them.

    That is what published perplexities are per; None for other formats than WikiText's.

    Raises:
        DataError: a file that cannot be read.
    """
    check_split(split)
    sources = () if split == "lm" else locate(config).of(split)
    if not sources or any(source.format != "wikitext" for source in sources):
        return None
    articles = (
        article
        for source in sources
        for article in raw_articles(read_lines(require_path(source.path), config.encoding))
    )
    return sum(map(words_and_ends, islice(articles, config.limit)))


def _read_for(found: Located, config: DatasetConfig, split: str) -> list[str]:
    """The splits whose files decide what `iter_texts` gives."""
    if split != "lm":
        return [split] if found.of(split) else ["train"]
    names = ["train"]
    if found.unlabelled:
        names += ["unlabelled", *held_out(found, config)]
    if config.lm_use_test:
        names.append("test")
    return [name for name in SPLITS if name in names]


def _estimate(config: DatasetConfig, split: str, measure: Callable[[bytes], int]) -> int | None:
    check_split(split)
    found = locate(config)
    left = 1 - drawn_share(found, config, "valid") - drawn_share(found, config, "test")
    if split == "lm":
        shares = {"train": left, "unlabelled": 1.0}
        if config.lm_use_test:
            shares |= {"test": 1.0} if found.test else {"train": left + drawn_share(found, config, "test")}
    elif found.of(split):
        shares = {split: left if split == "train" else 1.0}
    else:
        shares = {"train": drawn_share(found, config, split)}
    total = 0.0
    for name, share in shares.items():
        if any(source.format == "huggingface" for source in found.of(name)):
            return None
        paths = [path for source in found.of(name) for path in source_files(source)]
        if paths:
            head, packed = sample_bytes(paths[0], SAMPLE_BYTES)
            total += share * measure(head) / max(1, packed) * sum(path.stat().st_size for path in paths)
    return round(total)
