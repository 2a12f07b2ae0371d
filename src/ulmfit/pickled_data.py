"""Plain data out of a pickle, read and never run.

A pickle is a program: loading it may call anything. Here its instructions are listed by `pickletools`, and only those
that put lists, tuples, dictionaries, strings and numbers together are followed, on a stack of our own. There is no
instruction by which a name in the file could reach Python's import or a call.
"""

from __future__ import annotations

import mmap
import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Containers that vocabularies come in, as what they are here. Their classes are neither imported nor called.
_DICTIONARIES = {"collections.OrderedDict", "collections.Counter", "collections.defaultdict"}
_LISTS = {"fastcore.foundation.L", "fastai.data.transforms.CategoryMap", "fastai.text.transform.Vocab"}
_ARGUMENTS = {"builtins.int", "__builtin__.int", "__builtin__.long"}  # of a defaultdict

_NUMBERS = {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
_STRINGS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Name:
    path: str


def read_pickled_data(content: bytes) -> object:
    """The value in a pickle of lists, tuples, dictionaries, strings and numbers.

    `Counter`, `OrderedDict` and `defaultdict` become dictionaries, fastai's own lists become lists.

    Raises:
        ValueError: if it holds anything else (the message names it), or is no pickle.
    """
    machine = _Machine()
    try:
        for instruction, argument, _ in pickletools.genops(content):
            if instruction.name == "STOP":
                break
            machine.step(instruction.name, argument)
        return machine.stack.pop()
    except (IndexError, KeyError) as error:
        raise ValueError("it is damaged") from error


def refuse_expansion(path: Path) -> None:
    """See that a file of torch takes about as much memory as it has bytes, however hostile it is.

    torch itself (`weights_only=True`) runs nothing in it, but would inflate what is compressed, which torch never
    writes, and make byte arrays of any size.

    Raises:
        OSError, ValueError, zipfile.BadZipFile: it cannot be read, or would take more.
    """
    size = path.stat().st_size
    if size == 0:
        raise ValueError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name in (b"builtins\nbytearray\n", b"__builtin__\nbytearray\n"):
            if content.find(name) >= 0:
                raise ValueError("it makes byte arrays")
        if content[:4] != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its entries overlap")


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each open mark
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        if name in _NUMBERS or name in _STRINGS:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif not (self._container(name) or self._named(name, argument)):
            raise ValueError(f"it holds more than words (pickle instruction {name})")

    def _container(self, name: str) -> bool:
        if name in ("EMPTY_LIST", "LIST"):
            items = self._since_mark() if name == "LIST" else []
            self.stack.append(items)
        elif name in ("EMPTY_DICT", "DICT"):
            items = self._since_mark() if name == "DICT" else []
            self.stack.append({})
            self._set(items)
        elif name == "TUPLE":
            items = self._since_mark()
            self.stack.append(tuple(items))
        elif name in _TUPLES:
            items = [self.stack.pop() for _ in range(_TUPLES[name])]
            self.stack.append(tuple(reversed(items)))
        elif name in ("APPEND", "APPENDS"):
            items = self._since_mark() if name == "APPENDS" else [self.stack.pop()]
            self._expect(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            self._set(self._since_mark() if name == "SETITEMS" else [self.stack.pop(-2), self.stack.pop()])
        else:
            return False
        return True

    def _named(self, name: str, argument: Any) -> bool:
        """Instructions about classes: only the containers above, and what they become is an ordinary list or dict."""
        if name in ("GLOBAL", "STACK_GLOBAL"):
            path = str(argument).replace(" ", ".", 1)
            if name == "STACK_GLOBAL":
                last, module = self.stack.pop(), self.stack.pop()
                path = f"{module!s}.{last!s}" if isinstance(module, str) and isinstance(last, str) else "?"
            if path not in _DICTIONARIES | _LISTS | _ARGUMENTS:
                raise ValueError(f"it holds a Python object ('{path:.80}'), and loading such executes code")
            self.stack.append(_Name(path))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = self.stack.pop()
            made = self.stack.pop()
            path = made.path if isinstance(made, _Name) else ""
            if not isinstance(arguments, tuple) or path not in _DICTIONARIES | _LISTS:
                raise ValueError("it makes a call")
            if path in _LISTS:
                self.stack.append([])
            else:
                self.stack.append(dict(arguments[0]) if arguments and isinstance(arguments[0], dict) else {})
        elif name == "BUILD":
            state = self.stack.pop()
            items = state.get("items", state.get("itos")) if isinstance(state, dict) else None
            if not isinstance(items, list):
                raise ValueError("it holds an object without a list of items")
            self._expect(list)[:] = items
        else:
            return False
        return True

    def _since_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def _expect(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError("it is damaged")
        return self.stack[-1]

    def _set(self, items: list[Any]) -> None:
        target = self._expect(dict)
        keys = items[::2]
        if len(items) % 2 or not all(isinstance(key, str | int) for key in keys):
            raise ValueError("it holds a dictionary whose keys are not words")  # hashing a deep tuple overflows
        target.update(zip(keys, items[1::2], strict=True))
