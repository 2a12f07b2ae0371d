"""Every command of docs/scaling.md composes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from ulmfit.hydra_config import load_config

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"


def commands() -> list[str]:
    """The lines of the bash blocks that train, long ones joined."""
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if "ulmfit train" in line]


@pytest.mark.parametrize("command", commands())
def test_composes(command: str) -> None:
    words = shlex.split(command, comments=True)
    words = [word for word in words[words.index("train") + 1 :] if word != "--multirun"]
    launcher = [word for word in words if word.startswith(("hydra/launcher=", "hydra.launcher."))]
    if launcher:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra 'sweep'")
    plain = [re.sub(r"(=[^,\[]*),.*", r"\1", word) for word in words if word not in launcher]
    config = load_config("train", [*plain, *launcher])
    if "trainer=ddp" in words or "trainer=ddp_multinode" in words:
        assert config.trainer.strategy.startswith("ddp")
    assert config.trainer.num_nodes == (2 if "trainer=ddp_multinode" in words else 1)


def test_there_are_commands() -> None:
    assert len(commands()) >= 10
