"""What is fuzzed: for each kind of file a function that reads bytes as such a file, and seeds to start from.

A target returns quietly or raises a `UlmfitError`; anything else is a finding. Used by the mutation fuzzer in
`test_hostile.py` and by the coverage-guided one in `fuzz_atheris.py`.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ulmfit.bundle import ENCODER_FILE, INFO_FILE, BundleInfo, load_bundle, model_card, save_bundle
from ulmfit.config import DatasetConfig, ReportConfig, TokenizerConfig, TrainConfig
from ulmfit.data.cache import TokenCache, build_token_cache
from ulmfit.data.sources import load_splits, read_table
from ulmfit.errors import UlmfitError
from ulmfit.text.tokenizer import META_FILE, MODEL_FILE, Tokenizer

NAMES = (
    "bundle.json", "safetensors", "tokenizer.model", "tokenizer.json", "csv", "tsv", "jsonl", "text", "parquet",
    "cache", "run folder", "history", "vocabulary", "checkpoint",
)  # fmt: skip
ROWS = [("the laptop is broken", "hardware"), ("reset my password, please", "account"), ('a "quote"\nand more', "x")]
TEXTS = ["the cat sat on the mat and the dog ran"] * 20


@dataclass(frozen=True)
class Target:
    """How to read bytes as one kind of file."""

    read: Callable[[bytes], None]
    seeds: list[bytes] = field(repr=False)


class Workshop:
    """A folder with a small bundle, a token cache and a finished run; targets replace one file of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = Tokenizer.train(TEXTS, TokenizerConfig(vocab_size=300))
        self.bundle = self._bundle()
        self.cache = build_token_cache(iter(TEXTS), self.tokenizer, folder / "tokens", "0" * 32, workers=1)
        (self.cache_folder,) = (folder / "tokens").iterdir()
        self.run = self._run()
        self.checkpoints = self._checkpoints()
        self.models = {name: self.bundle / name for name in (INFO_FILE, ENCODER_FILE, MODEL_FILE, META_FILE)}
        self.whole = {path: path.read_bytes() for path in self.models.values()}

    def targets(self) -> dict[str, Target]:
        """All targets by name."""
        info, weights = self.whole[self.models[INFO_FILE]], self.whole[self.models[ENCODER_FILE]]
        model, meta = self.whole[self.models[MODEL_FILE]], self.whole[self.models[META_FILE]]
        commas = "text,label\n" + "".join(f'"{text.replace(chr(34), chr(34) * 2)}",{label}\n' for text, label in ROWS)
        lines = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS)
        fasttext = "".join(f"__label__{label} {text.splitlines()[0]}\n" for text, label in ROWS)
        packed = [pack(commas.encode()) for pack in (gzip.compress, bz2.compress, lzma.compress)]
        return {
            "bundle.json": Target(self._replacing(INFO_FILE, sign=False), [_unsigned(info)]),
            "safetensors": Target(self._replacing(ENCODER_FILE), [weights, _header({}), _header(_tensor(), b"1234")]),
            "tokenizer.model": Target(self.read_model, [model, model[:2000]]),
            "tokenizer.json": Target(self._replacing(META_FILE), [meta]),
            "csv": Target(self._data("d.csv"), [commas.encode(), commas.encode("utf-16"), *packed]),
            "tsv": Target(self._data("d.tsv"), [commas.replace(",", "\t").encode()]),
            "jsonl": Target(self._data("d.jsonl"), [lines.encode(), b'{"text": "\\ud800", "label": 1.0}']),
            "text": Target(
                self._data("d.txt"), [fasttext.encode(), b" = Title = \n\n a b \n\n = Next = \n c", b"a\nb"]
            ),
            "parquet": Target(self._data("d.parquet"), self._parquet()),
            "cache": Target(self.read_cache, [self._cache_parts()]),
            "run folder": Target(
                self.read_run, [b"metrics.json\0" + self._metrics(), b"config.yaml\0" + self._config()]
            ),
            "history": Target(self.read_history, [b"epoch,step,train_loss_step,lr_0\n0,1,5.5,0.1\n0,2,,0.2\n"]),
            "vocabulary": Target(self.read_vocabulary, [pickle.dumps(["a", "b"], n) for n in range(6)] + [b'["a"]']),
            "checkpoint": Target(self.read_checkpoint, self.checkpoints),
        }

    def _replacing(self, name: str, sign: bool = True) -> Callable[[bytes], None]:
        """Reads the bundle with one file replaced, its checksum right, as an attacker would write it."""
        path, info = self.models[name], self.models[INFO_FILE]

        def read(content: bytes) -> None:
            for other, whole in self.whole.items():
                other.write_bytes(whole)
            path.write_bytes(content)
            if sign:
                values = json.loads(self.whole[info])
                values["checksums"].pop(INFO_FILE, None)  # its own; older bundles have none
                values["checksums"][name] = hashlib.sha256(content).hexdigest()
                info.write_text(_unsigned(json.dumps(values).encode()).decode())
            model_card(load_bundle(self.bundle).info).encode()

        return read

    def read_model(self, content: bytes) -> None:
        """A tokenizer that loads must also work."""
        tokenizer = Tokenizer(content, TokenizerConfig())
        tokenizer.encode("the cat \u732b sat" * 3)
        tokenizer.encode_batch(["", "a" * 200], sampling=True)
        tokenizer.decode(range(min(tokenizer.vocab_size, 5000)))

    def _data(self, name: str) -> Callable[[bytes], None]:
        path = self.folder / name

        def read(content: bytes) -> None:
            path.write_bytes(content)
            for label in ("label", None):
                with contextlib.suppress(UlmfitError):
                    read_table(path, label=label)
            load_splits(DatasetConfig(path=str(path)))

        return read

    def read_cache(self, content: bytes) -> None:
        """The three files of a token cache, one after the other behind their lengths."""
        first, second = struct.unpack("<HH", content[:4].ljust(4, b"\0"))
        rest = content[4:]
        parts = (rest[:first], rest[first : first + second], rest[first + second :])
        for name, part in zip(("meta.json", "offsets.bin", "tokens.bin"), parts, strict=True):
            (self.cache_folder / name).write_bytes(part)
        cache = TokenCache.open(self.cache_folder, self.tokenizer.vocab_size)
        ids = [int(i) for i in range(min(len(cache), 100)) for i in cache.document(i)]
        self.tokenizer.decode(ids)
        np.asarray(cache.lengths).sum()

    def read_run(self, content: bytes) -> None:
        """The name of a file in a run folder, a zero byte, and what is in it."""
        from ulmfit.tasks import report

        name, _, values = content.partition(b"\0")
        for known, whole in ((b"metrics.json", self._metrics()), (b"config.yaml", self._config())):
            (self.run / known.decode()).write_bytes(values if name == known else whole)
        with contextlib.redirect_stdout(io.StringIO()):
            report.run(ReportConfig(runs=str(self.run.parent)))

    def read_history(self, content: bytes) -> None:
        """The log that plots are drawn from."""
        from ulmfit import plots

        path = self.run / "log" / "attempt-0" / "metrics.csv"
        path.write_bytes(content)
        plots.read_history(self.run)

    def read_vocabulary(self, content: bytes) -> None:
        """Words of fastai: pickle, JSON and text."""
        from ulmfit.fastai_import import read_fastai_vocabulary

        for suffix in (".pkl", ".json", ".txt"):
            path = self.folder / f"itos{suffix}"
            path.write_bytes(content)
            with contextlib.suppress(UlmfitError):
                read_fastai_vocabulary(path)

    def read_checkpoint(self, content: bytes) -> None:
        """As recovery reads it, and as the import from fastai does."""
        from ulmfit.fastai_weights import read_fastai_checkpoint
        from ulmfit.training.checkpoints import WholeFiles

        path = self.folder / "last.ckpt"
        path.write_bytes(content)
        with contextlib.suppress(UlmfitError):
            WholeFiles().load_checkpoint(path, map_location="cpu", weights_only=True)
        read_fastai_checkpoint(path)

    # -- what there is to begin with ---------------------------------------------------------------------------------

    def _bundle(self) -> Path:
        import torch

        size = self.tokenizer.vocab_size
        info = BundleInfo(
            "classifier",
            {"vocab_size": size, "embedding_dim": 4, "hidden_dim": 4, "num_layers": 1},
            labels=["bad", "good"],
            pooling={"bptt": 70, "max_len": 1400, "head_hidden": 2},
            metrics={"accuracy": 0.9},
        )
        encoder = {"embedding.weight": torch.zeros(size, 4), "rnns.0.bias_hh_l0": torch.zeros(16)}
        return save_bundle(self.folder / "bundle", info, encoder, {"a": torch.zeros(2, 12)}, self.tokenizer)

    def _cache_parts(self) -> bytes:
        parts = [(self.cache_folder / name).read_bytes() for name in ("meta.json", "offsets.bin", "tokens.bin")]
        return struct.pack("<HH", len(parts[0]), len(parts[1])) + b"".join(parts)

    def _run(self) -> Path:
        folder = self.folder / "runs" / "helpdesk" / "classifier-01234567-seed0"
        (folder / "log" / "attempt-0").mkdir(parents=True)
        shutil.copytree(self.bundle, folder / "bundle")
        return folder

    def _metrics(self) -> bytes:
        test = {"error": 0.5, "macro_f1": 0.5, "accuracy": 0.5, "documents": 2, "per_class": {}, "confusion": [[1, 1]]}
        return json.dumps({"lm": {"valid_perplexity": 9.0}, "valid_accuracy": 0.5, "test": test, "seconds": 3}).encode()

    def _config(self) -> bytes:
        from dataclasses import asdict

        import yaml

        values = asdict(TrainConfig())
        text: str = yaml.safe_dump({name: values[name] for name in ("seed", "trainer")})
        return text.encode()

    def _checkpoints(self) -> list[bytes]:
        import torch

        state = {"state_dict": {"0.encoder.weight": torch.zeros(3, 2)}, "pytorch-lightning_version": "2.6.0"}
        contents = []
        for zipped in (True, False):
            buffer = io.BytesIO()
            torch.save(state, buffer, _use_new_zipfile_serialization=zipped)
            contents.append(buffer.getvalue())
        return contents

    def _parquet(self) -> list[bytes]:
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]})
        contents = []
        for compression in ("none", "snappy"):
            buffer = io.BytesIO()
            pyarrow.parquet.write_table(table, buffer, compression=compression)
            contents.append(buffer.getvalue())
        return contents


def workshop() -> Workshop:
    """A workshop in memory where the system has such a folder."""
    import tempfile

    shared = "/dev/shm" if os.path.isdir("/dev/shm") else None
    return Workshop(Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared)))


def _unsigned(info: bytes) -> bytes:
    """The description without the checksum of itself, which older bundles do not have."""
    values = json.loads(info)
    values["checksums"].pop(INFO_FILE, None)
    return json.dumps(values).encode()


def _header(header: object, payload: bytes = b"") -> bytes:
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + payload


def _tensor() -> dict[str, object]:
    return {"embedding.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
