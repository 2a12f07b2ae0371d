"""`ulmfit download`: a data set of the paper from where it is published, as files that every verb reads."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ulmfit.config import DatasetConfig, DownloadConfig
from ulmfit.data.fetching import fetch
from ulmfit.data.published import PUBLISHED, write_rows
from ulmfit.errors import UsageError
from ulmfit.locks import locked
from ulmfit.schema import shown

log = logging.getLogger("ulmfit")


def run(config: DownloadConfig) -> dict[str, Any]:
    """Fetch, check and convert; prints where the data set lies, and returns the file of each split.

    Raises:
        UsageError: a data set with no known address, or a split without a name for its file.
        UlmfitError, DataError: as `fetch` and `write_rows`.
    """
    dataset = config.dataset
    published = PUBLISHED.get(dataset.name)
    if published is None or dataset.path is None:
        raise UsageError(
            f"dataset={dataset.name} is not published where this program could fetch it, expected one of "
            f"{', '.join(PUBLISHED)}; of other data sets give files of your own, or dataset.path=hf:NAME"
        )
    folder = Path(dataset.path).expanduser()
    targets = {split: folder / _name(dataset, split) for split in published.rows}
    written = {split: str(target) for split, target in targets.items()}
    if all(target.is_file() for target in targets.values()):
        print(f"{folder} holds {dataset.name} already")
        return written
    with locked(folder / ".download.lock", "which downloads into it; wait for it or end it"):
        files: dict[str, Path] = {}
        for remote in published.files:
            log.info("fetching %s (%.1f MB)", remote.address, remote.size / 1e6)
            files[remote.name] = fetch(remote, folder)
        log.info("writing %s", ", ".join(target.name for target in targets.values()))
        write_rows(published, files, targets)
        for name, path in files.items():
            if path.name != name:  # what somebody put there is theirs
                path.unlink()
    counts = ", ".join(f"{count:,} {split}" for split, count in published.rows.items())
    print(f"{folder} holds {dataset.name}: {counts}")
    print(f"terms: {published.terms}")
    print(f"next:  ulmfit train dataset={dataset.name}")
    return written


def _name(dataset: DatasetConfig, split: str) -> str:
    name: str | None = getattr(dataset, split)
    if not name or name.endswith(".zst"):
        raise UsageError(
            f"dataset.{split}={shown(name)}: expected the name of the file to write, such as train.csv or train.csv.bz2"
        )
    return name
