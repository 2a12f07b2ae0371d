"""The models that lie in the repository beside the package: whole, in files small enough to send, and fluent."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ulmfit.bundle import LANGUAGE_MODEL, load_bundle
from ulmfit.nn.build import language_model_from
from ulmfit.tasks.locations import REPOSITORY_MODELS, choose_parent, resolve_bundle

MODELS = sorted(path.parent for path in REPOSITORY_MODELS.glob("*/bundle.json"))
ENGLISH = (
    "The house was built in 1871 for a merchant of the city. After his death it became a school, and in 1954 it was "
    "given to the town, which has used it as a library since then."
)

pytestmark = pytest.mark.skipif(not MODELS, reason="needs the repository's models/, which no package holds")


@pytest.mark.parametrize("folder", MODELS, ids=lambda path: path.name)
def test_a_model_of_the_repository(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_bundle(folder.name, LANGUAGE_MODEL) == folder
    assert max(path.stat().st_size for path in folder.iterdir()) < 16 << 20
    bundle = load_bundle(folder, LANGUAGE_MODEL)  # checksums and all
    info = bundle.info
    assert info.provenance["name"] == folder.name
    assert "CC BY-SA" in info.provenance["licence"]
    assert choose_parent("en-base", "lm_finetune", None, "x", info.direction).path == folder
    ids = bundle.tokenizer.documents([ENGLISH])[0].tolist()
    row = torch.tensor([ids[:1] + ids[1:][::-1] if info.direction == "backward" else ids])
    model = language_model_from(bundle).eval()
    with torch.no_grad():
        loss, *_ = model.loss(row[:, :-1], row[:, 1:])
    assert float(loss) < info.metrics["valid_loss"] + 1 < math.log(bundle.tokenizer.vocab_size) - 4
