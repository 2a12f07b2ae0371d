"""What a user reads when something goes wrong: one sentence and an exit code for every kind of exception."""

from __future__ import annotations

import errno
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence

from ulmfit.errors import LostProcess, NotFinished, Stopped, UlmfitError, disk_full

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")
EXTRAS = {"pyarrow": "parquet", "datasets": "datasets", "tensorboard": "tensorboard", "wandb": "wandb"}


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from; Lightning turns Ctrl-C into `SystemExit` and keeps the original as context."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def sentence(error: BaseException, command: Sequence[str]) -> tuple[str, int]:
    """The sentence for an exception (empty: say nothing) and the exit code.

    `command` is the command line without the program's name, for the hint how to resume.
    """
    resume = f"ulmfit {shlex.join(command)}"
    if isinstance(error, NotFinished):
        return f"{error}; to resume, repeat: {resume}", error.exit_code
    if isinstance(error, UlmfitError):
        return " ".join(str(error).split()), error.exit_code
    if any(isinstance(cause, KeyboardInterrupt) for cause in chain(error)):
        hint = f"; to resume, repeat: {resume}" if command[:1] == ["train"] else ""
        return f"interrupted{hint}", INTERRUPTED
    if isinstance(error, Stopped):
        return f"stopped by {error.signal}; to resume, repeat: {resume}", int(error.code or 0)
    if isinstance(error, SystemExit):
        return ("", error.code) if isinstance(error.code, int) else (str(error.code or ""), 1 if error.code else 0)
    if isinstance(error, BrokenPipeError):  # the reader of our output, such as `head`, has had enough
        return "", 0
    text = " ".join(str(error).split())
    place = f" ({error.filename!s:.200})" if isinstance(error, OSError) and error.filename else ""
    if any(disk_full(cause) for cause in chain(error)):
        return f"the disk is full{place}: free some space, or set runs= and cache= to another disk, and repeat", 1
    if isinstance(error, PermissionError):
        return f"permission denied{place}: choose another place with runs=, cache= or output=, or change the rights", 1
    memory = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    if memory or (isinstance(error, RuntimeError) and any(sign in text.lower() for sign in OUT_OF_MEMORY)):
        device = "GPU memory" if "CUDA" in text or "HIP" in text else "memory"
        return f"out of {device}: {_smaller(command)}", 1
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error.name or text), 1
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        # A file where a folder is expected, a name too long, a read-only disk: nothing that a traceback explains.
        reason = error.strerror[0].lower() + error.strerror[1:]
        wrong_path = isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError)
        code = 2 if wrong_path or error.errno == errno.ENAMETOOLONG else 1
        return f"a file cannot be read or written: {reason}{place}; check the path, or choose another place", code
    text = text if len(text) <= 300 else text[:300] + "..."
    return f"{type(error).__name__}: {text or 'no message'}; run again with --debug for the traceback", 1


def _smaller(command: Sequence[str]) -> str:
    """Which settings of a command decide how much memory it takes."""
    verb = command[0] if command else ""
    stage = next((word.partition("=")[2] for word in reversed(command) if word.startswith("stage=")), "all")
    if verb not in ("train", "find_lr"):
        settable = any(verb == name for name in ("evaluate", "predict"))
        return f"set a smaller batch_size{'' if settable else ', or use a smaller model'}, or free some memory"
    language_model = "stage.lm.batch_size, or stage.lm.bptt"
    classifier = "stage.classifier.batch_size, stage.classifier.tokens_per_batch or stage.classifier.max_len"
    if stage.startswith("lm_"):
        return f"set a smaller {language_model} (with stage.lm.optim.accumulate higher, the steps stay as large)"
    if stage == "classifier":
        return f"set a smaller {classifier} (with stage.classifier.optim.accumulate higher, the steps stay as large)"
    return f"set a smaller {language_model} in the language model, {classifier} in the classifier"


def missing_package(name: str) -> str:
    """The sentence for a package that cannot be imported; `name` is its name, or a message that holds it."""
    for package, extra in EXTRAS.items():
        if re.search(rf"\b{package}\b", name):
            return f"the Python package '{package}' is missing: pip install 'ulmfit[{extra}]'"
    return f"the Python package '{name.partition('.')[0]}' is missing: install ulmfit again, or run with --debug"


def report(error: BaseException, command: Sequence[str], debug: bool, prefix: str = "ulmfit") -> int:
    """Prints the sentence to standard error, after the traceback if `debug`, and returns the exit code."""
    message, code = sentence(error, command)
    if debug and not isinstance(error, SystemExit):
        traceback.print_exception(error, file=sys.stderr)
    if message and not isinstance(error, LostProcess):
        # Names and labels come from files: none of them may speak to the terminal.
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        print(f"{prefix}: {message}", file=sys.stderr, flush=True)
    return code
