"""Token caches: all documents of a corpus as one flat memory-mapped array, built once with constant memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ulmfit.ahead import shared
from ulmfit.errors import DataError, UlmfitError
from ulmfit.status_line import StatusLine
from ulmfit.text.corpus import portions
from ulmfit.text.tokenizer import Tokenizer
from ulmfit.text.word_table import id_type
from ulmfit.whole_file import partial_folder, put_folder, read_small, remove_abandoned

Tokens = npt.NDArray[Any]  # uint16 or uint32
_Encoded = tuple[Tokens, npt.NDArray[np.int64], int]  # ids, how many each document has, characters
FORMAT_VERSION = 1
_CHUNK_CHARS = 1_000_000  # text handed to a worker at a time: bounds memory, hides the hand-over
_SEVERAL = 2  # chunks from which on it pays to start processes
_MANY = 8  # chunks from which on it pays to load compiled loops


class NoDocuments(DataError):
    """A text without a single document, as a small share of few rows may be."""


class TokenCache:
    """Documents as token ids, one after the other; each starts with the begin marker.

    Attributes:
        tokens: (N,) uint16 or uint32, flat.
        offsets: (D + 1,) int64; document i is `tokens[offsets[i]:offsets[i + 1]]`.
        characters: of the documents' text; None: not known.
    """

    def __init__(self, tokens: Tokens, offsets: npt.NDArray[np.int64], characters: int | None = None) -> None:
        self.tokens = tokens
        self.offsets = offsets
        self.characters = characters

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> Tokens:
        """Token ids of one document (a view)."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(D,) tokens per document, begin marker included."""
        return np.diff(self.offsets)

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], tokenizer: Tokenizer, threads: int = 1, sampling: bool = False
    ) -> TokenCache:
        """Tokenise into memory, keeping order and empty documents."""
        tokens, lengths = tokenizer.flat_documents(texts, threads, sampling)
        return cls(tokens, np.append(0, np.cumsum(lengths)), sum(map(len, texts)))

    @classmethod
    def from_documents(cls, documents: Sequence[Sequence[int]], vocab_size: int) -> TokenCache:
        """From lists of ids that already start with the begin marker."""
        offsets = np.zeros(len(documents) + 1, dtype=np.int64)
        np.cumsum([len(d) for d in documents], out=offsets[1:])
        tokens = np.fromiter(chain.from_iterable(documents), dtype=id_type(vocab_size), count=int(offsets[-1]))
        return cls(tokens, offsets)

    @classmethod
    def open(cls, folder: Path, vocab_size: int | None = None) -> TokenCache:
        """Memory-map a cache written by `build_token_cache`.

        Args:
            vocab_size: of the tokenizer; the tokens are read through once to see that each is one of its ids.

        Raises:
            DataError: if it is incomplete or damaged.
        """
        try:
            meta = json.loads(read_small(folder / "meta.json", 1 << 20))
            count, documents, dtype = int(meta["tokens"]), int(meta["documents"]), str(meta["dtype"])
            characters = int(meta["characters"])
            if meta["format_version"] != FORMAT_VERSION or dtype not in ("uint16", "uint32"):
                raise ValueError("it was written by another version")
            sizes = [(folder / name).stat().st_size for name in ("offsets.bin", "tokens.bin")]
            if sizes != [8 * (documents + 1), np.dtype(dtype).itemsize * count]:
                raise ValueError("sizes do not match")
            offsets = np.fromfile(folder / "offsets.bin", dtype=np.int64)
            # The comparison, unlike a difference, does not overflow.
            if offsets[0] != 0 or offsets[-1] != count or (offsets[1:] <= offsets[:-1]).any():
                raise ValueError("documents do not match")
            tokens: Tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r", shape=(count,))
            if vocab_size is not None and int(tokens.max()) >= vocab_size:
                raise ValueError(f"it holds ids beyond the {vocab_size} of its tokenizer")
        except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
            raise DataError(
                f"the token cache {folder} is damaged ({error}); delete the folder and run again"
            ) from error
        return cls(tokens, offsets, characters)


def cache_path(folder: Path, key: str, tokenizer: Tokenizer) -> Path:
    """Where `build_token_cache` puts the cache for `key`."""
    return folder / f"{key[:32]}-{tokenizer.fingerprint}"


def build_token_cache(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    folder: Path,
    key: str,
    total_bytes: int | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> TokenCache:
    """Open the cache for `key` under `folder`, tokenising `texts` first if it is not there.

    Args:
        texts: documents, read once and only when needed; empty ones are left out.
        key: names the content (see `sources.content_key`); the tokenizer's fingerprint is added.
        total_bytes: size of the text, for the time left; None: unknown.
        workers: processes; None: all cores for a large text, this process for a small one.
        progress: whether to report on standard error.

    Memory is bounded by 8 chunks and a few per worker, however large the text. The folder appears whole or not at all.
    A script needs no `if __name__ == "__main__"` for the workers.

    Raises:
        NoDocuments: if there is no document that is not empty.
        DataError: if the cache that stands there is damaged, or the text cannot be read.
        UlmfitError: if a worker was killed.
    """
    final = cache_path(folder, key, tokenizer)
    remove_abandoned(folder)
    if final.exists():
        return TokenCache.open(final, tokenizer.vocab_size)
    with partial_folder(final) as partial:
        _write(texts, tokenizer, partial, total_bytes, workers, progress)
        if not final.exists():  # otherwise another process was faster
            put_folder(partial, final)
    return TokenCache.open(final, tokenizer.vocab_size)


def _write(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    folder: Path,
    total_bytes: int | None,
    workers: int | None,
    progress: bool,
) -> None:
    dtype = id_type(tokenizer.vocab_size)
    workers = (os.cpu_count() or 1) if workers is None else workers
    chunks = portions((text for text in texts if text and not text.isspace()), _CHUNK_CHARS)
    head = deque(islice(chunks, _MANY))
    small = len(head) < _SEVERAL or workers < 2
    compiled = len(head) == _MANY and tokenizer.compile()
    chunks = chain((head.popleft() for _ in range(len(head))), chunks)  # so that none is held longer than it takes
    offsets, count, chars, started = array("q", [0]), 0, 0, time.monotonic()
    status = StatusLine(log_seconds=10)
    with open(folder / "tokens.bin", "wb") as out:
        for tokens, lengths, read in _tokenised(chunks, tokenizer, 1 if small else workers, compiled):
            out.write(tokens.data)
            offsets.frombytes((count + np.cumsum(lengths, dtype=np.int64)).tobytes())
            count += len(tokens)
            chars += read
            if progress and not small and status.due():
                status.show(_progress(chars, count, total_bytes, time.monotonic() - started))
    seconds = time.monotonic() - started
    if progress and not small:
        how = f"{workers} {'threads' if compiled else 'processes'}"
        rate = f"{count / max(seconds, 1e-9) / 1e3:.0f} k tokens/s with {how}"
        print(
            f"{status.cleared()}tokenised: {count / 1e6:.1f} M tokens in {seconds:.0f} s, {rate}",
            file=sys.stderr,
            flush=True,
        )
    if count == 0:
        raise NoDocuments("the text holds no documents, expected at least one that is not empty")
    (folder / "offsets.bin").write_bytes(offsets.tobytes())  # numpy's tofile would not say that the disk is full
    meta = {
        "format_version": FORMAT_VERSION,
        "tokens": count,
        "documents": len(offsets) - 1,
        "characters": chars,
        "dtype": np.dtype(dtype).name,
        "fingerprint": tokenizer.fingerprint,
        "seconds": round(seconds, 2),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: list[str]) -> _Encoded:
    assert _worker_tokenizer is not None
    return _encode_chunk(chunk, _worker_tokenizer)


def _encode_chunk(chunk: list[str], tokenizer: Tokenizer) -> _Encoded:
    return *tokenizer.flat_documents(chunk), sum(map(len, chunk))


def _tokenised(chunks: Iterator[list[str]], tokenizer: Tokenizer, workers: int, compiled: bool) -> Iterator[_Encoded]:
    work = partial(_encode_chunk, tokenizer=tokenizer)
    if workers < 2:
        yield from map(work, chunks)
        return
    pool: Executor
    submit: Callable[[list[str]], Future[_Encoded]]
    if compiled:  # and so, threads do not wait for one another
        pool = ThreadPoolExecutor(workers - 1, "tokenise")
        submit = partial(pool.submit, work)
    else:
        # spawn: torch's threads do not survive a fork
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers - 1, context, initializer=_start_worker, initargs=(tokenizer,))

        submit = partial(_submit_hidden, pool)

    try:
        # This process is one of the workers, and tokenises while the others start.
        yield from shared(submit, work, chunks, 2 * (workers - 1))
    except BrokenProcessPool as error:
        raise UlmfitError("a process that tokenises was killed, perhaps for want of memory; run again") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit_hidden(pool: Executor, chunk: list[str]) -> Future[_Encoded]:
    with _main_hidden():  # this may start a worker
        return pool.submit(_work, chunk)


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Keeps new processes from running the user's script first, which would start this build again in each."""
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def _progress(chars: int, tokens: int, total: int | None, seconds: float) -> str:
    left = "" if not total else f", {max(0.0, seconds * (total - chars) / max(chars, 1)):.0f} s left"
    rate = tokens / max(seconds, 1e-9)
    return f"tokenising: {chars / 1e6:.0f} M characters, {rate / 1e3:.0f} k tokens/s{left}"
