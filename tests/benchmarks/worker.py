"""A process that prepares one side of a case, then measures once for every line "go" it reads.

python worker.py ours|theirs TASK FOLDER SETTINGS, the settings as JSON; replies are JSON lines.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    side, task, folder, settings = sys.argv[1:5]
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log

    def reply(answer: dict[str, Any]) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    try:
        measure = getattr(importlib.import_module(side), task)(Path(folder), json.loads(settings))
        reply({"ready": True})
        for line in sys.stdin:
            if line.strip() != "go":
                break
            before = _processor_seconds()
            measured = measure()
            reply({**measured, "cpu_seconds": _processor_seconds() - before})
    except BaseException as error:
        traceback.print_exc()
        absent = isinstance(error, ModuleNotFoundError)
        reply({"failed": f"{error.name} is not installed" if absent else f"{type(error).__name__}: {error}"})


def _processor_seconds() -> float:
    """Of this process and of those it started that have ended: on a busy machine it says more than the clock."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)  # to the microsecond; os.times() counts hundredths


if __name__ == "__main__":
    main()
