"""`ulmfit predict`: labels and probabilities for a file or standard input, as JSON lines."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from ulmfit.config import LONGEST_DOCUMENT, PredictConfig
from ulmfit.data.files import refuse_long
from ulmfit.data.sources import read_table
from ulmfit.errors import DataError, UsageError
from ulmfit.tasks.locations import classifiers_to_use
from ulmfit.whole_file import whole_file

_CHUNK = 4096  # texts held at a time: input of any length streams through


def run(config: PredictConfig) -> dict[str, Any]:
    """Write one JSON line per text, in order; returns how many.

    Raises:
        DataError: no text given, or standard input that is not UTF-8.
    """
    if config.input is None and (sys.stdin is None or sys.stdin.isatty()):
        raise UsageError("no text was given; pipe lines to this command or name a file with input=FILE")
    if config.output is not None and Path(config.output).is_dir():
        raise UsageError(f"output={config.output} is a folder, expected the name of a file for the predictions")
    paths = classifiers_to_use(config.bundle, config.runs)
    texts = _texts(config)
    import torch

    from ulmfit.inference import Predictor

    if config.threads:
        torch.set_num_threads(config.threads)
    predictor = Predictor(list(paths), precision=config.precision)
    if config.output is None:
        return {"documents": _write(predictor, texts, sys.stdout, config.batch_size)}
    with whole_file(Path(config.output)) as partial, open(partial, "w", encoding="utf-8") as out:
        count = _write(predictor, texts, out, config.batch_size)
    print(f"{count} predictions written to {config.output}", file=sys.stderr)
    return {"documents": count}


def _write(predictor: Any, texts: Iterator[str], out: TextIO, batch_size: int) -> int:
    only_ascii = not re.fullmatch("utf-?8", getattr(out, "encoding", None) or "utf-8", flags=re.IGNORECASE)
    count = 0
    while chunk := list(islice(texts, _CHUNK)):
        for text, prediction in zip(chunk, _predictions(predictor, chunk, batch_size), strict=True):
            line = {
                "text": text,
                "label": prediction.label,
                "probability": round(prediction.probability, 6),
                "probabilities": {name: round(value, 6) for name, value in prediction.probabilities.items()},
            }
            out.write(json.dumps(line, ensure_ascii=only_ascii) + "\n")
        out.flush()
        count += len(chunk)
    if count == 0:
        raise DataError("the input holds no text, expected at least one line")
    return count


def _predictions(predictor: Any, chunk: Sequence[str], batch_size: int) -> Sequence[Any]:
    if len(chunk) == 1:
        return [predictor.predict_one(chunk[0])]
    found: Sequence[Any] = predictor.predict(chunk, batch_size)
    return found


def _texts(config: PredictConfig) -> Iterator[str]:
    if config.input is not None:
        return iter(read_table(config.input, config.text).texts)
    return _standard_input()


def _standard_input() -> Iterator[str]:
    """One text a line. Bytes that are not UTF-8 are an error, whatever the terminal's encoding is."""
    stream = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline=None)
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(LONGEST_DOCUMENT + 1)
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input is not UTF-8 (near line {number}); convert it, for example with iconv -t utf-8"
            ) from error
        if not line:
            return
        refuse_long(len(line), LONGEST_DOCUMENT, f"standard input, line {number},")
        yield line.rstrip("\n")
