"""The command line: `ulmfit VERB key=value ...`.

The verb is taken off the arguments, Hydra composes and sweeps with one primary configuration per verb, and the verb's
task gets a checked dataclass. While a task runs, `sys.argv` is a command line that runs just this job again, because
that is what Lightning starts for the other ranks of distributed training.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ulmfit import __version__, failures
from ulmfit.arguments import Arguments, parse
from ulmfit.ranks import main_process, speaker
from ulmfit.schema import VERBS

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger("ulmfit")

RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Jobs:
    """What the jobs of one command came to."""

    process: int = field(default_factory=os.getpid)
    done: int = 0
    failed: int = 0
    exit_code: int = 0
    error: BaseException | None = None
    runs: str = "runs"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (without the program's name; default `sys.argv`) and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character ends nothing
    debug = "--debug" in words or "debug=true" in words
    with plain_messages(debug):
        try:
            code = dispatch(parse(words), words)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush succeeds
            return 0
        except BaseException as error:
            return failures.report(error, words, debug, prefix=speaker())


def dispatch(arguments: Arguments, words: Sequence[str]) -> int:
    """Does what the command line asks for."""
    if arguments.version:
        print(f"ulmfit {__version__}")
    elif arguments.completion:
        complete(arguments)
    elif arguments.verb is None:
        from ulmfit import help_text

        print(help_text.top())
    elif arguments.help:
        show_help(arguments)
    else:
        return run_verb(arguments, words)
    return 0


def show_help(arguments: Arguments) -> None:
    """Help of a verb, its keys with the values that this command line would give them."""
    from omegaconf import OmegaConf

    from ulmfit import help_text, hydra_config
    from ulmfit.composition_errors import explained

    assert arguments.verb is not None
    try:
        config = hydra_config.composed(arguments.verb, arguments.overrides, arguments.config_dir)
        values = readable(OmegaConf.to_container(config, resolve=False), config)
    except hydra_config.CONFIGURATION_ERRORS as error:
        raise explained(arguments.verb, error) from error
    print(help_text.for_verb(arguments.verb, values, arguments.config_dir))


def readable(values: Any, config: Any) -> Any:
    """Nested values with interpolations resolved where they can be; a value still to be given reads '???'."""
    if not isinstance(values, dict):
        return values
    result = {}
    for name, value in values.items():
        if isinstance(value, str) and "${" in value:
            try:
                result[name] = config[name]
            except Exception:  # a resolver of the value may raise anything
                result[name] = "???"
        else:
            result[name] = readable(value, config[name])
    return result


def run_verb(arguments: Arguments, words: Sequence[str]) -> int:
    """Lets Hydra compose the configuration and call the verb's task, once or, in a sweep, for each combination."""
    import hydra

    from ulmfit import conf_files, hydra_config
    from ulmfit.composition_errors import explained

    assert arguments.verb is not None
    hydra_config.register(arguments.verb)
    overrides = arguments.overrides + (["debug=true"] if arguments.debug else [])
    jobs = Jobs()
    decorate = hydra.main(config_path=str(conf_files.conf_dir()), config_name=arguments.verb, version_base="1.3")
    with command_line([*arguments.flags, *overrides]), environment(HYDRA_FULL_ERROR="1"):
        try:
            decorate(task_for(arguments, words, jobs))()
        except hydra_config.CONFIGURATION_ERRORS as error:
            raise explained(arguments.verb, error) from error
    if jobs.error is not None:
        raise jobs.error
    if arguments.multirun and jobs.done + jobs.failed and main_process():
        failed = f", {jobs.failed} failed" if jobs.failed else ""
        logger.info("%d of %d runs finished%s.", jobs.done, jobs.done + jobs.failed, failed)
        logger.info("Compare them: ulmfit report runs=%s", jobs.runs)
    return jobs.exit_code


def task_for(arguments: Arguments, words: Sequence[str], jobs: Jobs) -> Callable[[DictConfig], Any]:
    """The function that Hydra calls with the composed configuration of each job."""
    verb, config_dir = arguments.verb, arguments.config_dir
    assert verb is not None

    def task(composed: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        from ulmfit import hydra_config
        from ulmfit.composition_errors import explained

        hydra_config.register(verb)  # a launcher may have started another process for this job
        job = HydraConfig.get()
        sweep = job.mode == RunMode.MULTIRUN
        again = [verb, *(["--config-dir", str(config_dir.resolve())] if config_dir else []), *job.overrides.task]
        again += [word for word in job.overrides.hydra if word.startswith("hydra.searchpath=")]
        if sweep:
            again.append("hydra.mode=RUN")
            logger.info("Run %d: %s", job.job.num + 1, " ".join(job.overrides.task))
        try:
            with command_line(again), process_group_of_its_own(), started_as_ulmfit(os.getpid() != jobs.process):
                config = hydra_config.to_config(verb, composed)
                jobs.runs = config.runs
                result = importlib.import_module(f"ulmfit.tasks.{verb}").run(config)
        except hydra_config.CONFIGURATION_ERRORS as error:
            return failed(explained(verb, error), sweep)
        except Exception as error:
            return failed(error, sweep)
        jobs.done += 1
        return result

    def failed(error: Exception, sweep: bool) -> None:
        """In a sweep the other jobs go on; in a launcher's process the error has to travel as an exception."""
        if os.getpid() != jobs.process:
            raise error
        if not sweep:
            jobs.error = error
            return
        jobs.failed += 1
        prefix = f"{speaker()}: run {jobs.done + jobs.failed}"
        jobs.exit_code = failures.report(error, words, arguments.debug, prefix)

    return task


@contextmanager
def command_line(words: Sequence[str]) -> Iterator[None]:
    """`sys.argv` with these words after the program's name."""
    before = sys.argv
    sys.argv = [before[0], *words]
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def started_as_ulmfit(changed: bool) -> Iterator[None]:
    """In the process of a launcher such as submitit, what Lightning starts again is `ulmfit`, not that launcher."""
    main = sys.modules["__main__"]
    before = main.__spec__
    if changed:
        main.__spec__ = importlib.util.find_spec("ulmfit.__main__")
    try:
        yield
    finally:
        main.__spec__ = before


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables with these values, then as they were."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        restore(before)


@contextmanager
def process_group_of_its_own() -> Iterator[None]:
    """Leaves nothing of distributed training behind, else a sweep's next job would take itself for one of its ranks."""
    before = {name: os.environ.get(name) for name in RANK_VARIABLES}
    try:
        yield
    finally:
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
        processes = sys.modules.get("ulmfit.training.processes")
        if processes is not None:
            processes.end_children()
        restore(before)


def restore(variables: dict[str, str | None]) -> None:
    """Sets environment variables, or removes those that are None."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def complete(arguments: Arguments) -> None:
    """Tab completion: verbs from here, the rest from Hydra, which is given the line without the verb."""
    from ulmfit import conf_files, hydra_config

    line = os.environ.get("COMP_LINE", "")
    before, words = line, line.split()
    verb = arguments.verb or "train"
    if any(word.startswith("query=") for word in arguments.overrides):
        if len(words) < 2 or (len(words) == 2 and not line[-1:].isspace()):
            print(" ".join(name for name in VERBS if len(words) < 2 or name.startswith(words[1])))
            return
        if words[1] not in VERBS:
            return
        verb = words[1]
        before = words[0] + line.split(verb, 1)[1]
    import hydra

    hydra_config.register(verb)
    decorate = hydra.main(config_path=str(conf_files.conf_dir()), config_name=verb, version_base="1.3")
    with command_line([*arguments.flags, *arguments.overrides]), environment(COMP_LINE=before, HYDRA_FULL_ERROR="1"):
        decorate(lambda composed: None)()


@contextmanager
def plain_messages(debug: bool) -> Iterator[None]:
    """Plain lines of the `ulmfit` logger, and our warnings, on standard error; of ranks above 0 only warnings."""
    handlers, propagate, level, showwarning = logger.handlers[:], logger.propagate, logger.level, warnings.showwarning
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.WARNING if not main_process() else logging.DEBUG if debug else logging.INFO)
    if not debug:  # torch's own log, such as DDP's hint at a setting that is needed
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.showwarning = show_warning
    try:
        yield
    finally:  # standard error may be another one for the next caller in this process
        logger.handlers[:], logger.propagate, warnings.showwarning = handlers, propagate, showwarning
        logger.setLevel(level)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our own warnings are for users, so without the place in the code; others as Python shows them."""
    if file is None and Path(filename).is_relative_to(Path(__file__).parent):
        logger.warning("%s", " ".join(str(message).split()))
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        print(text, end="", file=file or sys.stderr)
