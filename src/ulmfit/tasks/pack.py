"""`ulmfit pack`: the tokenised corpus as files of limited size, for a machine that only trains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ulmfit.config import PackConfig
from ulmfit.data.cache import cache_path
from ulmfit.data.locate import has_split
from ulmfit.data.packed import MANIFEST, check_output, pack
from ulmfit.data.sources import content_key
from ulmfit.tasks.locations import cache_folder

log = logging.getLogger("ulmfit")


def run(config: PackConfig) -> dict[str, Any]:
    """Learn the tokenizer, tokenise, pack, and print what was written; returns the manifest.

    The text is what a language model would be trained on with the same settings.

    Raises:
        DataError: `output` holds something already, or as reading the texts.
    """
    from ulmfit.tasks.inputs import lm_cache, tokenizer_for

    folder = Path(config.output)
    check_output(folder)  # before hours of tokenising
    tokenizer = tokenizer_for(config, None, config.stage.lm)
    caches: dict[str, Path] = {}
    for split, texts in (("train", "lm"), ("valid", "valid")):
        if split == "train" or has_split(config.dataset, "valid"):
            lm_cache(config, tokenizer, texts)
            place, key = cache_folder(config.cache) / "tokens", content_key(config.dataset, texts)
            caches[split] = cache_path(place, key, tokenizer)
    log.info("packing into %s", folder)
    part_bytes = config.part_mb * 1_000_000
    manifest = pack(folder, tokenizer, caches, part_bytes, config.dataset.name, config.dataset.licence)
    sizes = [about["bytes"] for about in manifest["files"].values()]
    print(
        f"{folder}: {MANIFEST} and {len(sizes)} files, {sum(sizes) / 1e6:.1f} MB, none over {max(sizes) / 1e6:.1f} MB"
    )
    print(f"to train on it:  ulmfit train stage=lm_pretrain dataset=packed dataset.path={folder}")
    return manifest
