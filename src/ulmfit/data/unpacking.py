"""Decompression piece by piece that neither takes memory without limit nor passes over a missing end.

`gzip` and `bz2` of the standard library are like that. Its `lzma` lets a file ask for gigabytes, and `zstandard` takes
a file that was cut off for a whole one.
"""

from __future__ import annotations

import lzma
from typing import Any, BinaryIO

_XZ_MEMORY = 1 << 28  # `xz -9` needs 65 MiB
_CHUNK = 1 << 20
# One block of Zstandard may stand for 128 KiB in four bytes, and a call returns all that its input unpacks to.
_ZSTD_SIP = 1 << 10
_CUT_OFF = "it ends in the middle"


class XZ:
    """One or several xz streams, perhaps with padding between them."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decoder = self._new()

    @staticmethod
    def _new() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end. Raises EOFError or lzma.LZMAError for what is damaged."""
        while True:
            packed = b""
            if self._decoder.eof:  # another stream may follow, behind zeros
                packed = self._decoder.unused_data.lstrip(b"\0")
                while not packed and (more := self._raw.read(_CHUNK)):
                    packed = more.lstrip(b"\0")
                if not packed:
                    return b""
                self._decoder = self._new()
            elif self._decoder.needs_input:
                packed = self._raw.read(_CHUNK)
                if not packed:
                    raise EOFError(_CUT_OFF)
            if data := self._decoder.decompress(packed, size):
                return data


class Zstandard:
    """One or several Zstandard frames, read with the `zstandard` module."""

    def __init__(self, raw: BinaryIO, module: Any) -> None:
        self._raw = raw
        self._module = module
        self._decoder: Any = None  # of the frame that has begun and not ended
        self._packed = b""
        self._ready = memoryview(b"")

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end. Raises EOFError or the module's own error for what is damaged."""
        while not self._ready:
            packed = self._packed or self._raw.read(_ZSTD_SIP)
            if not packed:
                if self._decoder is not None:
                    raise EOFError(_CUT_OFF)
                return b""
            if self._decoder is None:
                self._decoder = self._module.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._decoder.decompress(packed))
            self._packed = b""
            if self._decoder.eof:
                self._packed = self._decoder.unused_data
                self._decoder = None
        data, self._ready = self._ready[:size], self._ready[size:]
        return bytes(data)
