"""Coverage-guided fuzzing of one target: `python tests/stress/fuzz_atheris.py TARGET [options of libFuzzer]`.

Needs `pip install atheris`. The target `all` is all of them, the first byte says which. For example
`... fuzz_atheris.py csv -max_total_time=300 -timeout=30 -rss_limit_mb=4096`; a finding stops it, and the input lies in
the working directory as `crash-*`, `timeout-*` or `oom-*`.
"""

from __future__ import annotations

import logging
import shutil
import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["ulmfit", "csv", "json", "pickletools", "yaml"]):
    sys.path.insert(0, str(Path(__file__).parent))
    import fuzz_targets
    import yaml  # noqa: F401

    import ulmfit.data.sources
    import ulmfit.fastai_import
    import ulmfit.tasks.report
    import ulmfit.training.checkpoints  # noqa: F401

from ulmfit.errors import UlmfitError


def main() -> None:
    """Fuzz the target named first on the command line; further words are libFuzzer's."""
    place = fuzz_targets.workshop()
    targets = place.targets()
    name = sys.argv.pop(1)
    chosen = list(targets.values()) if name == "all" else [targets[name]]
    executions = [0] * len(chosen)
    seeds = place.folder / "seeds"
    seeds.mkdir()
    for number, target in enumerate(chosen):
        for i, seed in enumerate(target.seeds):
            prefix = bytes([number]) if name == "all" else b""
            (seeds / f"{number}-{i}").write_bytes(prefix + seed)

    def one(content: bytes) -> None:
        number = 0
        if name == "all":
            number, content = (content[0] if content else 0) % len(chosen), content[1:]
        executions[number] += 1
        if sum(executions) % 10_000 == 0:
            print(dict(zip(targets, executions, strict=False)), flush=True)
        try:
            chosen[number].read(content)
        except UlmfitError as error:
            if "\n" in str(error) or len(str(error)) > 2000:
                raise AssertionError("the message is not one sentence") from error

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    atheris.Setup([*sys.argv, str(seeds)], one)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
