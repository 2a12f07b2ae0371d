"""Random changes of seeds for so many seconds: `python tests/stress/fuzz_mutations.py TARGET SECONDS SEED`.

Runs as a process of its own, with a limit of memory and of time for each input. Prints how many inputs it tried. The
input at which it ended otherwise is in `last-input` in the working directory.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import random
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_targets

from ulmfit.errors import UlmfitError

MEMORY = 12 << 30  # addresses, of which torch takes a few GB for its libraries
SECONDS_EACH = 120
TOKENS = [
    b"\0", b"\n", b"\r", b'"', b",", b"\t", b"{", b"[", b"]", b"}", b":", b"-", b"1", b"9" * 400, b"1e999", b"NaN",
    b"null",
    b"\xff" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0" * 8, b"\x80", b"(", b"c", b"R", b".", b"\xef\xbb\xbf",
    b"\xff\xfe", b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PAR1", b"PK\x03\x04", b"__label__",
    b" = ", b'{"a":' * 50, b"[" * 50, b"&a [*a]", b"!!python/name:os.system", b"\\ud800", "\u2028é猫🙂".encode(),
]  # fmt: skip


def changed(seed: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    """A few random edits: bytes, tokens, lengths, pieces repeated or of another seed, the end cut off."""
    content = bytearray(seed)
    for _ in range(int(2 ** rng.uniform(0, 4))):
        start = rng.randrange(len(content) + 1)
        size = int(2 ** rng.uniform(0, 6))
        kind = rng.randrange(7)
        if kind == 0 and content:
            content[start % len(content)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[start : start + size // 4] = rng.randbytes(size // 4)
        elif kind == 2:
            content[start : start + rng.choice([0, 1, 4, 8])] = rng.choice(TOKENS)
        elif kind == 3:
            content[start:start] = bytes(content[start : start + size]) * rng.choice([1, 2, 100])
        elif kind == 4:
            del content[start : start + size]
        elif kind == 5:
            other = rng.choice(seeds)
            place = rng.randrange(len(other) + 1)
            content[start : start + size] = other[place : place + size]
        elif rng.random() < 0.2:
            del content[start:]
    return bytes(content[:100_000])


def main() -> None:
    """Until the time is over, or something else comes out than a `UlmfitError` of one sentence."""
    name, seconds, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    place = fuzz_targets.workshop()
    target = place.targets()[name]
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for content in target.seeds:  # which also imports what is needed
        with contextlib.suppress(UlmfitError):
            target.read(content)
    rng = random.Random(seed)
    last = Path("last-input")
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        content = changed(rng.choice(target.seeds), target.seeds, rng)
        last.write_bytes(content)
        faulthandler.dump_traceback_later(SECONDS_EACH, exit=True)
        message = ""
        try:
            target.read(content)
        except UlmfitError as error:
            message = str(error)
        assert "\n" not in message and len(message) < 2000, message
        count += 1
    faulthandler.cancel_dump_traceback_later()
    last.unlink()
    shutil.rmtree(place.folder)
    print(count, flush=True)


if __name__ == "__main__":
    main()
