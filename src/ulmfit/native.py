"""Loops that Numba compiles (extra `fast`), kept on disk as object code, and loaded from there without Numba.

Numba has a cache of its own, which is read with pickle, and knows no function that calls another by its address. Here
such addresses, and those of other libraries, are numbers that stand for names until all is linked together.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from ulmfit.whole_file import whole_file

log = logging.getLogger("ulmfit")

Build = Callable[[], Mapping[str, int]]
_MOST = 16 << 20  # bytes of object code
# Of the numbers that stand for a name: no address, and none that a program has otherwise; too far apart for LLVM to
# compute one from another.
_FIRST, _APART = 0x5EED << 48, 1 << 36
_NUMBER = re.compile(r"\b\d{19}\b")
_PREFIX = "ulmfit_"
_OF_C = {"floorf", "memcpy", "memset"}  # functions that each process has
_COUNTING = re.compile(r"^define linkonce_odr void @(NRT_incref|NRT_decref)\(.*?^\}$", re.MULTILINE | re.DOTALL)
_NO_COUNTING = r"define linkonce_odr void @\1(ptr %place) alwaysinline {\n  ret void\n}"
_lock = threading.RLock()  # around all that compiles, links or numbers
_numbers = count()
_names: dict[int, str] = {}  # by number
_texts: dict[str, str] = {}  # of functions, by name
_alive: list[Any] = []  # the machine code


def user_cache() -> Path:
    """$ULMFIT_CACHE, else this package's folder in the user's cache."""
    if os.environ.get("ULMFIT_CACHE"):
        return Path(os.environ["ULMFIT_CACHE"])
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        base = given if given.is_absolute() else Path.home() / ".cache"  # as XDG wants it
    return base / "ulmfit"


def is_available() -> bool:
    """Whether Numba is installed, and object code of this system is known to work here."""
    return sys.platform == "linux" and find_spec("numba") is not None


# -- parts of loops --------------------------------------------------------------------------------------------------


@cache
def pointer() -> Any:
    """For compiled loops: (address, type) -> pointer to numbers of that type, for `carray`."""
    numba, extending = import_module("numba"), import_module("numba.extending")

    @extending.intrinsic  # type: ignore[untyped-decorator]
    def made(context: Any, address: Any, dtype: Any) -> Any:
        of_type = numba.types.CPointer(dtype.dtype)
        make = lambda c, builder, s, given: builder.inttoptr(given[0], c.get_value_type(of_type))  # noqa: E731
        return of_type(numba.types.int64, dtype), make

    return made


@cache
def prefetch(for_writing: bool = True) -> Any:
    """For compiled loops: (address) -> nothing; the line of the cache there is fetched, to be written or read soon."""
    numba = import_module("numba")

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        fetch_line(builder, given[0], for_writing)
        return context.get_dummy_value()

    @import_module("numba.extending").intrinsic  # type: ignore[untyped-decorator]
    def fetch(context: Any, address: Any) -> Any:
        return numba.void(numba.int64), generate

    return fetch


def fetch_line(builder: Any, address: Any, for_writing: bool) -> None:
    """Tell LLVM's `builder` to fetch the line of the cache at an address."""
    ir = import_module("llvmlite.ir")
    i32, place = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [place, i32, i32, i32])
    function = builder.module.declare_intrinsic("llvm.prefetch", [place], kind)
    level, data = 3 if for_writing else 2, 1  # the first, or the second of the caches
    how = [ir.Constant(i32, each) for each in (int(for_writing), level, data)]
    builder.call(function, [builder.inttoptr(address, place), *how])


def part(function: Callable[..., Any], **how: Any) -> Any:
    """Compiled for those that call it."""
    exact = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return import_module("numba").njit(function, **exact, **how)


def symbol(name: str) -> int:
    """A number that stands for the address of a function of another library."""
    with _lock:
        return _numbered(_PREFIX + name)


def unit(function: Callable[..., Any], signature: Any, again: bool = False, **how: Any) -> int:
    """`function` compiled to be called by address: a number that stands for that.

    Args:
        signature: of addresses and numbers of 64 bits, to nothing.
        again: whether to optimise it once more, without the counting of references, which nobody needs here.
        how: Numba's options.
    """
    name = f"{_PREFIX}{next(_numbers)}_{function.__name__}"
    made = part(function, **how)
    made.compile(signature.args)
    text = _COUNTING.sub(_NO_COUNTING, made.inspect_llvm(made.signatures[0]))
    types = ["i64" if arg == import_module("numba").int64 else "ptr" for arg in signature.args]
    inner = made.overloads[made.signatures[0]].fndesc.llvm_func_name
    given = ", ".join(f"{kind} %{n}" for n, kind in enumerate(types))
    # As Numba calls functions: a place for what comes back, one for an error, then what is given.
    text += (
        f"\ndefine void @{name}({given}) {{\n  %result = alloca i64\n  %error = alloca ptr\n"
        f'  %status = call i32 @"{inner}"(ptr %result, ptr %error, {given})\n  ret void\n}}\n'
    )
    with _lock:
        _texts[name] = _optimised(text) if again else text
        return _numbered(name)


def _numbered(name: str) -> int:
    number = next((number for number, known in _names.items() if known == name), _FIRST + _APART * len(_names))
    _names[number] = name
    return number


# -- object code -----------------------------------------------------------------------------------------------------


def kept(
    name: str, sources: Iterable[Path], facts: Sequence[object], build: Build, symbols: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Addresses of functions that were compiled before, or are now, and kept in the user's cache.

    Args:
        name: of the file.
        sources: what decides the functions; where one changes, or Numba, LLVM or the processor, they are compiled anew.
        facts: what else does.
        build: makes them: their `unit` by name.
        symbols: addresses of what they call elsewhere (`symbol`).
    """
    with _lock:
        file = f"{name}-{_fingerprint(sources, facts)}.o"
        found = _read(file)
        if found is not None:
            return _loaded(found, symbols or {})
        code = _linked(build(), symbols or {})
        try:
            _keep(file, code)
        except (OSError, RuntimeError) as error:  # the latter where nobody knows a home directory
            log.info("what is compiled is not kept: %s", error)
        return _loaded(code, symbols or {})


def loaded(units: Mapping[str, int], symbols: Mapping[str, int] | None = None) -> dict[str, int]:
    """Addresses of functions, of which nothing is kept."""
    with _lock:
        return _loaded(_linked(units, symbols or {}), symbols or {})


def _folder() -> Path:
    return user_cache() / "compiled"


def _keep(file: str, code: bytes) -> None:
    """For this user alone: where groups may write by default (umask 002), `_read` would not take it."""
    _folder().mkdir(parents=True, exist_ok=True)
    status = _folder().lstat()
    if status.st_uid != os.getuid():
        raise PermissionError(f"{_folder()} belongs to another user")
    if stat.S_ISDIR(status.st_mode) and status.st_mode & 0o022:
        _folder().chmod(stat.S_IMODE(status.st_mode) & ~0o022)
    with whole_file(_folder() / file) as partial:
        partial.touch(mode=0o600)
        partial.write_bytes(code)


def _read(file: str) -> bytes | None:
    """What is kept, if it is whole, and nobody else could have written it."""
    try:
        path = _folder() / file
        # What is looked at is what is read, and a pipe keeps nobody waiting.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
            found = [os.fstat(opened.fileno()), path.parent.stat()]
            if any(each.st_uid != os.getuid() or each.st_mode & 0o022 for each in found):
                log.warning("others may write to %s; what is compiled there is not used", path)
                return None
            if not stat.S_ISREG(found[0].st_mode) or found[0].st_size > _MOST:
                return None
            code = opened.read(_MOST)
    except (OSError, ValueError, RuntimeError):
        return None
    if hashlib.sha256(code[32:]).digest() != code[:32]:
        log.warning("%s is damaged and made anew", path)
        return None
    return code


def _fingerprint(sources: Iterable[Path], facts: Sequence[object]) -> str:
    llvm = import_module("llvmlite.binding")
    digest = hashlib.sha256()
    known = [version("numba"), version("llvmlite"), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    for each in [sys.version, *known, *facts, *settings]:
        digest.update(f"{each}\n".encode())
    for source in [Path(__file__), *sources]:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _linked(units: Mapping[str, int], symbols: Mapping[str, int]) -> bytes:
    """Object code of units, by name, and of all that they call, behind its SHA-256.

    Raises:
        ValueError: if they call what is nowhere.
    """
    llvm, machine = import_module("llvmlite.binding"), _machine()
    wanted, modules, seen = [_names[number] for number in units.values()], [], set()
    while wanted:
        name = wanted.pop()
        if name in seen or name not in _texts:
            continue
        seen.add(name)
        called = {_names[int(number)] for number in _NUMBER.findall(_texts[name]) if int(number) in _names}
        text = _NUMBER.sub(_as_name, _texts[name])
        modules.append(llvm.parse_assembly(text + "".join(f"declare void @{each}()\n" for each in called - {name})))
        wanted += called
    whole, *others = modules
    for other in others:
        whole.link_in(other)
    for name, number in units.items():
        whole.get_function(_names[number]).name = _PREFIX + name
    _run(whole, machine, 0)
    missing = {f.name for f in whole.functions if f.is_declaration and not f.name.startswith("llvm.")}
    missing -= {_PREFIX + each for each in symbols} | _OF_C
    if missing:
        raise ValueError(f"the functions {', '.join(sorted(missing))} are nowhere")
    names = "\n".join(units).encode()
    content: bytes = len(names).to_bytes(4, "little") + names + machine.emit_object(whole)
    return hashlib.sha256(content).digest() + content


def _as_name(match: re.Match[str]) -> str:
    name = _names.get(int(match[0]))
    return match[0] if name is None else f"ptrtoint (ptr @{name} to i64)"


def _optimised(text: str) -> str:
    module = import_module("llvmlite.binding").parse_assembly(text)
    _run(module, _machine(), 3)
    return str(module)


def _run(module: Any, machine: Any, level: int) -> None:
    """Optimise at a level, 0 to 3, and leave out all that Numba has put beside it."""
    llvm = import_module("llvmlite.binding")
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=level))
    passes = builder.getModulePassManager() if level else llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, builder)


def _machine() -> Any:
    llvm = import_module("llvmlite.binding")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


def _loaded(code: bytes, symbols: Mapping[str, int]) -> dict[str, int]:
    llvm = import_module("llvmlite.binding")
    for name, address in symbols.items():
        llvm.add_symbol(_PREFIX + name, address)
    behind = 36 + int.from_bytes(code[32:36], "little")
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code[behind:]))
    engine.finalize_object()
    _alive.append(engine)
    found = {name: engine.get_function_address(_PREFIX + name) for name in code[36:behind].decode().split("\n")}
    if not all(found.values()):
        raise ValueError(f"the compiled code lacks some of {', '.join(found)}")
    return found


def function(address: int, arguments: int = 1) -> Callable[..., None]:
    """To call a function of so many numbers of 64 bits from Python; other threads go on meanwhile."""
    called: Callable[..., None] = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(address)
    return called
