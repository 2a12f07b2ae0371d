"""Loops that Numba compiles, kept on disk as text of LLVM, and loaded from there without Numba (extra `fast`).

Numba has a cache of its own, which is read with pickle.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ulmfit.whole_file import read_small, whole_file

log = logging.getLogger("ulmfit")

_MOST = 16 << 20  # bytes of a text
_ENTRY = "ulmfit_entry"
_COUNTING = re.compile(r"^define linkonce_odr void @(NRT_incref|NRT_decref)\(.*?^\}$", re.MULTILINE | re.DOTALL)
_NO_COUNTING = r"define linkonce_odr void @\1(ptr %place) alwaysinline {\n  ret void\n}"
_alive: list[Any] = []  # the machine code


def user_cache() -> Path:
    """$ULMFIT_CACHE, else this package's folder in the user's cache."""
    if os.environ.get("ULMFIT_CACHE"):
        return Path(os.environ["ULMFIT_CACHE"])
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "ulmfit"


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
    numba, ir = import_module("numba"), import_module("llvmlite.ir")

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        i32, place = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [place, i32, i32, i32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [place], kind)
        level, data = 3 if for_writing else 2, 1  # the first, or the second of the caches
        how = [ir.Constant(i32, each) for each in (int(for_writing), level, data)]
        builder.call(function, [builder.inttoptr(given[0], place), *how])
        return context.get_dummy_value()

    @import_module("numba.extending").intrinsic  # type: ignore[untyped-decorator]
    def fetch(context: Any, address: Any) -> Any:
        return numba.void(numba.int64), generate

    return fetch


def loaded(name: str, sources: Sequence[Path], make: Callable[[], str]) -> Callable[[int], int]:
    """A function (address) -> int that was compiled before, or is now, and kept in the user's cache.

    Args:
        name: of the file.
        sources: what decides the function; where one changes, or Numba, LLVM or the processor, it is compiled anew.
        make: compiles it (`text_of`).
    """
    path = user_cache() / "compiled" / f"{name}-{_fingerprint(sources)}.ll"
    kept = _read(path)
    if kept is not None:
        try:
            return _function(kept)
        except RuntimeError as error:  # LLVM's, of what is no text of it
            log.warning("%s is damaged (%s) and made anew", path, str(error).strip().partition("\n")[0])
    text = make()
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        log.info("what is compiled is not kept: %s", error)
    return _function(text)


def part(function: Callable[..., Any]) -> Any:
    """Compiled for those that call it, in what becomes a text (`text_of`)."""
    numba = import_module("numba")
    return numba.njit(function, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)


def text_of(function: Callable[..., Any]) -> str:
    """LLVM's text of a function (int64) -> int64, with all that it calls, for `loaded`.

    Raises:
        ValueError: if it takes memory, for which Numba would have to be there.
    """
    numba, llvm = import_module("numba"), import_module("llvmlite.binding")
    made = part(function)
    made.compile((numba.int64,))
    (signature,) = made.signatures
    # All arrays are the caller's, so that nobody has to count who holds them.
    module = llvm.parse_assembly(_COUNTING.sub(_NO_COUNTING, made.inspect_llvm(signature)))
    module.get_function(made.overloads[signature].fndesc.llvm_func_name).name = _ENTRY
    builder = llvm.create_pass_builder(_machine(), llvm.create_pipeline_tuning_options(speed_level=3))
    passes = builder.getModulePassManager()
    passes.add_global_dead_code_eliminate_pass()  # all that Numba has put beside it
    passes.run(module, builder)
    if "@NRT_" in str(module):
        raise ValueError(f"{function.__name__} takes memory")
    return str(module)


def _read(path: Path) -> str | None:
    """A kept text, if it is there and nobody else could have written it."""
    try:
        found = [each.stat() for each in (path, path.parent)]
        if os.name == "posix" and any(each.st_uid != os.getuid() or each.st_mode & 0o022 for each in found):
            log.warning("others may write to %s; what is compiled there is not used", path)
            return None
        return read_small(path, _MOST).decode("utf-8")
    except (OSError, ValueError):
        return None


def _fingerprint(sources: Sequence[Path]) -> str:
    llvm = import_module("llvmlite.binding")
    digest = hashlib.sha256()
    known = [version("numba"), version("llvmlite"), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()]
    for part in [sys.version, *known]:
        digest.update(f"{part}\n".encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:32]


def _machine() -> Any:
    llvm = import_module("llvmlite.binding")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    return llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3, jit=True)


def _function(text: str) -> Callable[[int], int]:
    machine, llvm = _machine(), import_module("llvmlite.binding")
    module = llvm.parse_assembly(text)
    module.verify()
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _alive.append(engine)
    of_kind = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 2, ctypes.c_int64)  # as Numba calls functions
    call = of_kind(engine.get_function_address(_ENTRY))

    def run(address: int) -> int:
        result, problem = ctypes.c_int64(), ctypes.c_void_p()
        if call(ctypes.byref(result), ctypes.byref(problem), address):
            raise RuntimeError("a compiled loop failed")
        return result.value

    return run
