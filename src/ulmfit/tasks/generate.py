"""`ulmfit generate`: text that goes on from a prompt."""

from __future__ import annotations

from typing import Any

from ulmfit.bundle import LANGUAGE_MODEL, load_bundle
from ulmfit.config import GenerateConfig
from ulmfit.tasks.locations import language_model_to_use


def run(config: GenerateConfig) -> dict[str, Any]:
    """Print the samples, an empty line between them."""
    path = language_model_to_use(config.bundle, config.runs)
    from ulmfit.generation import generate

    texts = generate(
        load_bundle(path, LANGUAGE_MODEL),
        config.prompt,
        config.tokens,
        config.samples,
        config.temperature,
        config.top_k,
        config.top_p,
        config.beams,
        config.seed,
    )
    print("\n\n".join(texts))
    return {"texts": texts}
