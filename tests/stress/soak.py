"""A process that predicts for a long time: `python tests/stress/soak.py BUNDLE TEXTS` prints what it saw as JSON.

Texts of random lengths and scripts come one by one and in batches of random sizes, as a server gets them.
"""

from __future__ import annotations

import gc
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from ulmfit.inference import Predictor

WORDS = [
    *("my", "laptop", "does", "not", "start", "since", "the", "update", "printer", "jam", "PASSWORD", "reset"),
    *("Größe", "我的电脑", "الحاسوب", "🙂🙂", "<br />", "sooooo", "42", "\n"),
]
FIXED = ["", "my laptop does not start", "a", "我的电脑坏了 " * 30, "🙂", "word " * 3000, "\ud800 \0"]


def resident() -> int:
    """Bytes of memory that this process has in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def random_text(rng: random.Random) -> str:
    """Mostly short, now and then of thousands of words; sometimes new words, so that nothing could be remembered."""
    length = min(4000, int(rng.paretovariate(1.1) * 3)) if rng.random() < 0.9 else rng.randrange(3)
    return " ".join(rng.choice(WORDS) if rng.random() < 0.9 else f"x{rng.random()}" for _ in range(length))


def requests(count: int, rng: random.Random) -> Iterator[list[str]]:
    """`count` texts in portions: one in three a single text, others up to 256."""
    while count > 0:
        size = min(count, 1 if rng.random() < 0.3 else int(2 ** rng.uniform(0, 8)))
        yield [random_text(rng) for _ in range(size)]
        count -= size


def main() -> None:
    """Predict so many texts; memory at each tenth, answers to the same texts before and after."""
    torch.set_num_threads(1)
    bundle, count = sys.argv[1], int(sys.argv[2])
    predictor = Predictor([bundle], "cpu")
    rng = random.Random(0)

    def answers() -> list[list[float]]:
        together = predictor.probabilities(FIXED).tolist()
        return [*together, *(list(predictor.predict_one(text).probabilities.values()) for text in FIXED)]

    first = answers()
    memory: list[int] = []
    done = single = 0
    for texts in requests(count, rng):
        if len(texts) == 1:
            predictor.predict_one(texts[0])
            single += 1
        else:
            predictor.predict(texts, rng.choice([8, 64, 256]))
        done += len(texts)
        while len(memory) < done * 10 // count:
            gc.collect()
            memory.append(resident())
    print(json.dumps({"texts": done, "single": single, "memory": memory, "same": first == answers()}))


if __name__ == "__main__":
    main()
