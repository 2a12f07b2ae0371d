"""Token caches: exact, built once, in bounded memory, whole or not at all, whoever else builds them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import needs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ulmfit.config import TokenizerConfig
from ulmfit.data import cache as module
from ulmfit.data.cache import TokenCache, build_token_cache
from ulmfit.errors import DataError
from ulmfit.text import compiled_words, word_table, words
from ulmfit.text.tokenizer import Tokenizer

TEXTS = [
    f"Document {i}: the cat sat on the mat {'again and ' * (i % 7)}\nÜber Größe {i * i}, 中文." for i in range(400)
]


COMPILE = Tokenizer.compile


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=500))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_CHARS", 1_000)
    monkeypatch.setattr(Tokenizer, "compile", lambda self: False)


@pytest.fixture(params=["processes", pytest.param("threads", marks=needs.numba)])
def ways(request: pytest.FixtureRequest, small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to share the work: arrays in processes, and compiled loops in threads."""
    if request.param == "threads":
        monkeypatch.setattr(Tokenizer, "compile", COMPILE)
    return str(request.param)


def as_lists(cache: TokenCache) -> list[list[int]]:
    return [cache.document(i).tolist() for i in range(len(cache))]


def expected(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    return [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]


# -- content ---------------------------------------------------------------------------------------------------------


def test_documents_and_offsets_are_exact(tokenizer, tmp_path, ways):
    built = build_token_cache(iter(TEXTS), tokenizer, tmp_path, "key", workers=1)
    documents = expected(TEXTS, tokenizer)
    assert as_lists(built) == documents
    assert len(built) == len(TEXTS)
    assert built.tokens.dtype == np.uint16
    assert isinstance(built.tokens, np.memmap)
    assert not built.tokens.flags.writeable
    assert built.offsets.dtype == np.int64
    assert built.offsets.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    assert built.lengths.tolist() == [len(d) for d in documents]
    assert built.tokens.tolist() == [i for d in documents for i in d]


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(max_size=20), max_size=8))
def test_in_memory_keeps_order_and_empty_documents(tokenizer, texts):
    cache = TokenCache.from_texts(texts, tokenizer)
    assert as_lists(cache) == expected(texts, tokenizer)
    assert cache.tokens.dtype == np.uint16
    assert as_lists(TokenCache.from_documents(expected(texts, tokenizer), tokenizer.vocab_size)) == as_lists(cache)


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=10), chars=st.integers(1, 60))
def test_any_texts_in_any_chunks(tokenizer, tmp_path_factory, texts, chars):
    folder = tmp_path_factory.mktemp("cache")
    texts = [*texts, "x"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_CHARS", chars)
        built = build_token_cache(iter(texts), tokenizer, folder, "key", workers=1, progress=False)
    assert as_lists(built) == expected([text for text in texts if text.strip()], tokenizer)


def test_empty_documents_are_left_out(tokenizer, tmp_path):
    built = build_token_cache(["", "one", " \n\t", "two", "\u3000"], tokenizer, tmp_path, "key")
    assert as_lists(built) == expected(["one", "two"], tokenizer)


@pytest.mark.parametrize("texts", [[], ["", " ", "\n"]])
def test_nothing_to_tokenise(tokenizer, tmp_path, texts):
    with pytest.raises(DataError, match="holds no documents, expected at least one that is not empty"):
        build_token_cache(iter(texts), tokenizer, tmp_path, "key")
    assert list(tmp_path.iterdir()) == []


def test_the_vocabulary_decides_the_width():
    for size, dtype in ((100, np.uint16), (65_536, np.uint16), (65_537, np.uint32), (10**6, np.uint32)):
        cache = TokenCache.from_documents([[2, size - 1], [2]], size)
        assert cache.tokens.dtype == dtype
        assert cache.tokens.tolist() == [2, size - 1, 2]


def test_a_wide_vocabulary_on_disk(tokenizer, tmp_path, ways, monkeypatch):
    """As with more than 65,536 pieces."""
    for each in (module, words, word_table, compiled_words):
        monkeypatch.setattr(each, "id_type", lambda size: np.uint32)
    tokenizer = Tokenizer(tokenizer._model, tokenizer.config)
    built = build_token_cache(TEXTS, tokenizer, tmp_path, "key", workers=1)
    assert built.tokens.dtype == np.uint32
    assert as_lists(built) == expected(TEXTS, tokenizer)
    assert (tmp_path / f"key-{tokenizer.fingerprint}" / "tokens.bin").stat().st_size == 4 * len(built.tokens)


# -- several processes -----------------------------------------------------------------------------------------------


def test_many_write_what_one_writes(tokenizer, tmp_path, ways, capsys):
    one = build_token_cache(iter(TEXTS), tokenizer, tmp_path, "one", workers=1)
    assert capsys.readouterr().err == ""
    many = build_token_cache(iter(TEXTS), tokenizer, tmp_path, "many", total_bytes=30_000, workers=3)
    assert capsys.readouterr().err.endswith(f" with 3 {ways}\n")
    for name in ("tokens.bin", "offsets.bin"):
        files = [(tmp_path / f"{key}-{tokenizer.fingerprint}" / name).read_bytes() for key in ("one", "many")]
        assert files[0] == files[1]
    assert as_lists(many) == as_lists(one)


SCRIPT = """
import sys
import threading
from pathlib import Path
from ulmfit.data import cache
from ulmfit.text.tokenizer import Tokenizer
with open("runs.txt", "a") as file:
    file.write("x")
cache._CHUNK_CHARS = 1000
compile, Tokenizer.compile = Tokenizer.compile, lambda self: False
tokenizer = Tokenizer.load("tokenizer")
texts = [f"Document {i}: the cat sat on the mat" for i in range(300)]
BEFORE
built = cache.build_token_cache(iter(texts), tokenizer, Path("cache"), "key", workers=3, progress=False)
print(len(built), int(built.tokens.astype(int).sum()))
"""


def script(tokenizer: Tokenizer, folder: Path, before: str = "") -> list[str]:
    tokenizer.save(folder / "tokenizer")
    (folder / "script.py").write_text(SCRIPT.replace("BEFORE", before))
    return [sys.executable, "script.py"]


def test_a_script_needs_no_main_guard(tokenizer, tmp_path):
    """The usual pool would run the script again in every worker, without end."""
    done = subprocess.run(script(tokenizer, tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    documents = expected([f"Document {i}: the cat sat on the mat" for i in range(300)], tokenizer)
    assert done.stdout.split() == ["300", str(sum(map(sum, documents)))]
    assert (tmp_path / "runs.txt").read_text() == "x"


def test_the_main_module_is_as_before(tokenizer, tmp_path, small_chunks):
    main = sys.modules["__main__"]
    before = dict(vars(main))
    build_token_cache(iter(TEXTS[:100]), tokenizer, tmp_path, "key", workers=2)
    assert {k: vars(main).get(k) for k in ("__file__", "__spec__")} == {
        k: before.get(k) for k in ("__file__", "__spec__")
    }


def test_a_killed_worker_is_an_error_not_a_hang(tokenizer, tmp_path):
    before = (
        "import os\n"
        "class Deadly(str):\n"
        "    def __reduce__(self): return (os._exit, (9,))\n"
        "texts[0] = Deadly('ends the worker that unpickles it')"
    )
    done = subprocess.run(
        script(tokenizer, tmp_path, before), cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 1
    assert "UlmfitError: a process that tokenises was killed, perhaps for want of memory; run again" in done.stderr
    assert list((tmp_path / "cache").iterdir()) == []


def test_two_processes_build_the_same_cache(tokenizer, tmp_path):
    before = "import time; time.sleep(max(0, float(sys.argv[1]) - time.time()))"
    command = [*script(tokenizer, tmp_path, before), str(time.time() + 1.5)]
    running = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [process.communicate(timeout=100)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert results[0] == results[1]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"key-{tokenizer.fingerprint}"]


def test_the_slower_of_two_builds_takes_what_is_there(tokenizer, tmp_path):
    """The other build finishes while this one is still reading; both see one and the same cache."""

    def texts() -> Iterator[str]:
        yield "first"
        build_token_cache(["first", "second"], tokenizer, tmp_path, "key")
        yield "second"

    built = build_token_cache(texts(), tokenizer, tmp_path, "key")
    assert as_lists(built) == expected(["first", "second"], tokenizer)
    assert len(list(tmp_path.iterdir())) == 1


def test_two_threads_build_the_same_cache(tokenizer, tmp_path):
    results: list[TokenCache] = []
    threads = [
        threading.Thread(target=lambda: results.append(build_token_cache(iter(TEXTS), tokenizer, tmp_path, "key")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(np.array_equal(result.tokens, results[0].tokens) for result in results)


@pytest.mark.skipif(os.name != "posix", reason="process groups and signals of POSIX")
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill"])
def test_workers_end_with_their_parent(tokenizer, tmp_path, sign):
    before = (
        "def slowly(texts=texts):\n"
        "    import time, multiprocessing\n"
        "    for i, text in enumerate(texts * 1000):\n"
        "        if i == 2000:\n"
        "            print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n"
        "        if i > 2000: time.sleep(0.1)\n"
        "        yield text\n"
        "texts = slowly()"
    )
    process = subprocess.Popen(
        script(tokenizer, tmp_path, before), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2  # and the parent is the third
    process.send_signal(sign)
    process.communicate(timeout=60)
    assert process.returncode != 0
    for _ in range(200):
        if not any(_alive(pid) for pid in workers):
            break
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in workers)
    if sign == signal.SIGINT:
        assert list((tmp_path / "cache").iterdir()) == []


@needs.numba
def test_ctrl_c_ends_threads_too(tokenizer, tmp_path):
    before = (
        "Tokenizer.compile = compile\n"
        "def endless(texts=texts):\n"
        "    while True:\n"
        "        yield from texts\n"
        "        if threading.active_count() > 1: print('ready', flush=True)\n"
        "texts = endless()"
    )
    command = script(tokenizer, tmp_path, before)
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors
    assert list((tmp_path / "cache").iterdir()) == []


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# -- once, whole or not at all ---------------------------------------------------------------------------------------


def test_built_once_then_opened(tokenizer, tmp_path):
    first = build_token_cache(iter(TEXTS), tokenizer, tmp_path, "key")

    def untouched() -> Iterator[str]:
        raise AssertionError("the texts were read again")
        yield ""

    again = build_token_cache(untouched(), tokenizer, tmp_path, "key")
    assert np.array_equal(again.tokens, first.tokens)
    with pytest.raises(AssertionError, match="read again"):
        build_token_cache(untouched(), tokenizer, tmp_path, "other key")


def test_another_tokenizer_has_another_cache(tokenizer, tmp_path):
    other = Tokenizer.train(TEXTS[:50], TokenizerConfig(vocab_size=320))
    for each in (tokenizer, other):
        built = build_token_cache(TEXTS[:20], each, tmp_path, "key")
        assert as_lists(built) == expected(TEXTS[:20], each)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, DataError])
def test_an_interrupted_build_leaves_nothing(tokenizer, tmp_path, small_chunks, error, workers):
    def texts() -> Iterator[str]:
        yield from TEXTS[:150]
        raise error("stop")

    with pytest.raises(error, match="stop"):
        build_token_cache(texts(), tokenizer, tmp_path / "cache", "key", workers=workers)
    assert list((tmp_path / "cache").iterdir()) == []
    built = build_token_cache(TEXTS[:150], tokenizer, tmp_path / "cache", "key", workers=1)
    assert len(built) == 150


def test_a_full_disk_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    def full(self: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        build_token_cache(TEXTS, tokenizer, tmp_path, "key")
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_fails_in_a_worker_fails_here(tokenizer, tmp_path, small_chunks):
    with pytest.raises((TypeError, AttributeError)):
        build_token_cache([*TEXTS[:100], 5, *TEXTS], tokenizer, tmp_path, "key", workers=2)  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []


def _change_meta(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        (folder / "meta.json").write_text(json.dumps({**meta, **changes}))

    return change


def _change_offsets(index: int, value: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        offsets = np.fromfile(folder / "offsets.bin", dtype=np.int64)
        offsets[index] = value
        offsets.tofile(folder / "offsets.bin")

    return change


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no tokens": lambda f: (f / "tokens.bin").unlink(),
    "no offsets": lambda f: (f / "offsets.bin").unlink(),
    "no description": lambda f: (f / "meta.json").unlink(),
    "cut tokens": lambda f: os.truncate(f / "tokens.bin", 100),
    "cut offsets": lambda f: os.truncate(f / "offsets.bin", 80),
    "odd offsets": lambda f: os.truncate(f / "offsets.bin", (f / "offsets.bin").stat().st_size - 3),
    "no offset": lambda f: os.truncate(f / "offsets.bin", 0),
    "cut description": lambda f: os.truncate(f / "meta.json", 20),
    "a list": lambda f: (f / "meta.json").write_text("[]"),
    "deep": lambda f: (f / "meta.json").write_text("[" * 100_000),
    "not text": lambda f: (f / "meta.json").write_bytes(b"\xff\xfe"),
    "objects": _change_meta(dtype="object"),
    "wide": _change_meta(dtype="uint32"),
    "no type": _change_meta(dtype=None),
    "infinite": _change_meta(tokens=float("inf")),
    "negative": _change_meta(tokens=-2, documents=-1),
    "newer": _change_meta(format_version=2),
    "backward": _change_offsets(2, 10**6),
    "start": _change_offsets(0, 1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_cache_is_an_error_with_the_way_out(tokenizer, tmp_path, name):
    build_token_cache(TEXTS[:50], tokenizer, tmp_path, "key")
    folder = tmp_path / f"key-{tokenizer.fingerprint}"
    DAMAGE[name](folder)
    with pytest.raises(DataError, match=r"damaged \(.*\); delete the folder and run again") as caught:
        build_token_cache(TEXTS[:50], tokenizer, tmp_path, "key")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_the_text_is_not_read_ahead(tokenizer, tmp_path, monkeypatch, workers):
    """Between what was read and what was written lie 8 chunks and a few per worker, never the text."""
    monkeypatch.setattr(module, "_CHUNK_CHARS", 5_000)
    written, furthest, read = 0, 0, 0
    original = module._tokenised

    def counted(*args: object) -> Iterator[object]:
        nonlocal written
        for result in original(*args):
            written += result[2]
            yield result

    def texts() -> Iterator[str]:
        nonlocal read, furthest
        for i in range(8_000):
            text = TEXTS[i % len(TEXTS)]
            read += len(text)
            furthest = max(furthest, read - written)
            yield text

    monkeypatch.setattr(module, "_tokenised", counted)
    build_token_cache(texts(), tokenizer, tmp_path, "key", workers=workers, progress=False)
    assert written == read > 400_000
    assert furthest < 5_100 * (module._MANY + 2 * workers + 4)


def test_memory_is_bounded(tokenizer, tmp_path, ways, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_CHARS", 20_000)

    def peak(count: int) -> int:
        texts = (TEXTS[i % len(TEXTS)] for i in range(count))
        tracemalloc.start()
        try:
            build_token_cache(texts, tokenizer, tmp_path, f"key {count}", workers=1)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1_000)  # fills the caches of words
    small, large = peak(2_000), peak(20_000)
    assert large < small + 18_000 * 40  # an offset each, while it grows and while it is copied


def test_progress_is_a_line_now_and_then(tokenizer, tmp_path, small_chunks, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 4))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "ProcessPoolExecutor", _Inline)
    build_token_cache(TEXTS, tokenizer, tmp_path, "key", total_bytes=30_000, workers=2)
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) > 3
    assert re.fullmatch(r"tokenised: \d+\.\d M tokens in \d+ s, \d+ k tokens/s with 2 processes", last)
    assert all(line.startswith("tokenising: ") and line.endswith(" s left") for line in lines)


class _Inline:
    """A pool of no processes."""

    def __init__(
        self, workers: int, context: object, initializer: Callable[..., None], initargs: tuple[object]
    ) -> None:
        module._worker_tokenizer = initargs[0]  # type: ignore[assignment]

    def submit(self, function: Callable[..., object], *args: object) -> object:
        done: Future[object] = Future()
        done.set_result(function(*args))
        return done

    def shutdown(self, cancel_futures: bool) -> None:
        module._worker_tokenizer = None
