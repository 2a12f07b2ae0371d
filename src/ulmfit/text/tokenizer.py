"""SentencePiece pieces over rule-marked text, with a fingerprint that tells if model and tokenizer belong together."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ulmfit.config import RulesConfig, TokenizerConfig
from ulmfit.errors import BundleError, DataError, UsageError, did_you_mean
from ulmfit.text.corpus import sample, sentences
from ulmfit.text.rules import MARKERS, Rules
from ulmfit.whole_file import read_small, whole_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT_VERSION = 1
MODEL_FILE = "tokenizer.model"
META_FILE = "tokenizer.json"
KINDS = ("unigram", "bpe")
# SentencePiece's unigram pieces depend on the number of threads, so it is part of the recipe.
_TRAIN_THREADS = 2


class Tokenizer:
    """Text to piece ids and back. A document is `[bos_id] + encode(text)`; backward, the pieces are reversed.

    `pad_id`, `unk_id` and `bos_id` are control ids: no text encodes to `pad_id` or `bos_id`.
    """

    pad_id = 0
    unk_id = 1
    bos_id = 2

    def __init__(self, model: bytes, config: TokenizerConfig) -> None:
        import sentencepiece

        from ulmfit.text.words import Words, fits

        self.config = config
        self.rules = Rules(config.rules)
        self._model = model
        try:
            if not model:  # which SentencePiece accepts, and complains about later
                raise ValueError("empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size: int = self._processor.vocab_size()
            self.pieces: list[str] = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
            specials = (self._processor.pad_id(), self._processor.unk_id(), self._processor.bos_id())
            by_word = fits(self._processor, self.pieces)
        except Exception as error:  # sentencepiece raises RuntimeError or ValueError without details
            raise BundleError("the tokenizer model is not a SentencePiece model; write the bundle again") from error
        if specials != (self.pad_id, self.unk_id, self.bos_id):
            raise BundleError(
                f"the tokenizer numbers its pad, unknown and begin pieces {specials}, expected (0, 1, 2); "
                "train it with ulmfit"
            )
        self._words = Words(self._processor, self.rules, self.pieces, self.bos_id) if by_word else None
        self.fingerprint = self._fingerprint()

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes, TokenizerConfig]]:
        """For handing a tokenizer to a worker process."""
        return Tokenizer, (self._model, self.config)

    # -- training ------------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        config: TokenizerConfig | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Tokenizer:
        """Learn pieces from at most `config.sample_chars` characters, sampled evenly from `texts` in bounded memory.

        Args:
            texts: raw documents, read once.
            config: kind, size and rules; defaults of `TokenizerConfig`.
            progress: called with the number of documents read so far, now and then.

        Raises:
                UsageError: for an unknown kind, a value out of range, or a vocabulary too small for the characters.
            DataError: if `texts` holds no text.
        """
        import sentencepiece

        config = config or TokenizerConfig()
        if config.kind not in KINDS:
            raise UsageError(
                f"tokenizer.kind is '{config.kind}', expected one of {', '.join(KINDS)}"
                f"{did_you_mean(config.kind, KINDS)}"
            )
        ranges = {
            "vocab_size": (300 if config.byte_fallback else 50, 10_000_000),
            "character_coverage": (0.98, 1.0),
            "max_piece_length": (1, 512),
            "sample_chars": (1, 10**12),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(config, name) <= high:
                raise UsageError(f"tokenizer.{name} is {getattr(config, name)}, expected {low} to {high}")
        lines = sample(sentences(texts, Rules(config.rules), progress), config.sample_chars)
        if not lines:
            raise DataError("the text to train a tokenizer on is empty, expected at least one document with words")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                model_type=config.kind,
                vocab_size=config.vocab_size,
                hard_vocab_limit=False,  # a small corpus gets as many pieces as it can support
                character_coverage=config.character_coverage,
                byte_fallback=config.byte_fallback,
                max_sentencepiece_length=config.max_piece_length,
                normalization_rule_name="identity",  # ours is done in `rules`, reversibly
                remove_extra_whitespaces=False,
                required_chars=MARKERS,
                pad_id=cls.pad_id,
                unk_id=cls.unk_id,
                bos_id=cls.bos_id,
                eos_id=-1,
                pad_piece="<pad>",
                unk_piece="<unk>",
                bos_piece="<bos>",
                num_threads=_TRAIN_THREADS,
                shuffle_input_sentence=False,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UsageError(
                f"a {config.kind} vocabulary of {config.vocab_size} pieces cannot be learnt from {len(lines)} "
                f"lines of text; choose another tokenizer.vocab_size ({_last_line(error)})"
            ) from error
        return cls(model.getvalue(), config)

    # -- text and ids --------------------------------------------------------------------------------------------

    # A text's words between spaces are segmented each on its own, so that a word has the same ids wherever it stands.
    # Over a text, SentencePiece decides near-ties by sums in 32 bits, which depend on all that went before. Sampling,
    # and a model whose pieces cross spaces, work on whole texts.

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without the begin marker."""
        if self._words is not None:
            return self._words.encode(text)
        ids: list[int] = self._processor.encode(self.rules.apply(text))
        return ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1, sampling: bool = False) -> list[list[int]]:
        """Ids of many texts. `sampling` (`config.sampling_alpha`) draws segmentations (Kudo 2018), on one thread."""
        return [document[1:].tolist() for document in self.documents(texts, threads, sampling)]

    def documents(self, texts: Sequence[str], threads: int = 1, sampling: bool = False) -> list[NDArray[Any]]:
        """As `encode_batch`, each behind the begin marker, as arrays."""
        flat, lengths = self.flat_documents(texts, threads, sampling)
        ends = lengths.cumsum().tolist()
        return [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def flat_documents(
        self, texts: Sequence[str], threads: int = 1, sampling: bool = False
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """As `documents`, all in one array (uint16, uint32 for more pieces), and how many ids each has."""
        import numpy as np

        from ulmfit.text.word_table import id_type

        if self._words is not None and not (sampling and self.config.sampling_alpha > 0):
            return self._words.documents(texts, threads)
        found: list[NDArray[np.int32]] = self._processor.encode(
            [self.rules.apply(text) for text in texts],
            return_type="numpy",
            add_bos=True,
            **self._how(threads, sampling),
        )
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        return np.concatenate([np.empty(0, np.int32), *found]).astype(id_type(self.vocab_size)), lengths

    def compile(self) -> bool:
        """Read texts by compiled loops from now on, 2 to 3 times as fast; whether they can be had (extra `fast`).

        It takes a quarter of a second, four more for the first time on a machine. Afterwards several threads can
        tokenise side by side.
        """
        return self._words is not None and self.config.kind == "unigram" and self._words.compile()

    def _how(self, threads: int, sampling: bool) -> dict[str, Any]:
        if sampling and self.config.sampling_alpha > 0:
            # Each thread of SentencePiece draws from its own stream, and which thread gets which text is a race:
            # only one thread repeats itself.
            return {"num_threads": 1, "enable_sampling": True, "alpha": self.config.sampling_alpha, "nbest_size": -1}
        return {"num_threads": threads}

    @staticmethod
    def seed_sampling(seed: int) -> None:
        """Start SentencePiece's random numbers at `seed`; the next batch drawn repeats itself."""
        import sentencepiece

        sentencepiece.set_random_generator_seed(seed % (1 << 32))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; control ids vanish. `decode(encode(text)) == rules.normalise(text)` with byte fallback.

        Raises:
            UsageError: for an id outside the vocabulary.
        """
        kept = [i for i in map(int, ids) if i not in (self.pad_id, self.bos_id)]
        if kept and not 0 <= min(kept) <= max(kept) < self.vocab_size:
            wrong = next(i for i in kept if not 0 <= i < self.vocab_size)
            raise UsageError(f"the id {wrong} is no piece of this tokenizer, expected 0 to {self.vocab_size - 1}")
        text: str = self._processor.decode(kept)
        return self.rules.invert(text)

    def is_byte(self, piece_id: int) -> bool:
        """Whether the piece stands for one byte of a character outside the vocabulary."""
        return bool(self._processor.is_byte(piece_id))

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.model` and `tokenizer.json`, each whole or not at all."""
        folder = Path(folder)
        meta = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "config": asdict(self.config),
        }
        for name, content in ((MODEL_FILE, self._model), (META_FILE, (json.dumps(meta, indent=2) + "\n").encode())):
            with whole_file(folder / name) as partial:
                partial.write_bytes(content)

    @classmethod
    def load(cls, folder: Path | str) -> Tokenizer:
        """Read a saved tokenizer.

        Raises:
            BundleError: if a file is missing, malformed, of a newer format, or does not match its fingerprint.
        """
        folder = Path(folder)
        for name in (MODEL_FILE, META_FILE):
            if not (folder / name).is_file():
                raise BundleError(f"{folder} holds no {name}, expected a folder written by ulmfit")
        try:
            model = read_small(folder / MODEL_FILE, 256 << 20)
            meta: dict[str, Any] = json.loads(read_small(folder / META_FILE, 1 << 20))
            version = meta["format_version"]
            if version != FORMAT_VERSION:
                raise BundleError(
                    f"{folder / META_FILE} has format {version!r:.20}, this version reads {FORMAT_VERSION}; "
                    "update ulmfit"
                )
            config, expected = _read_config(meta["config"]), meta["fingerprint"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, UsageError) as error:
            raise BundleError(
                f"{folder / META_FILE} is not a tokenizer description ({error!s:.200}); write it again"
            ) from error
        tokenizer = cls(model, config)
        if tokenizer.fingerprint != expected:
            raise BundleError(
                f"{folder / MODEL_FILE} has fingerprint {tokenizer.fingerprint}, {META_FILE} expects {expected!r:.40}; "
                "the two files are not from the same tokenizer"
            )
        return tokenizer

    def _fingerprint(self) -> str:
        """Of what decides which ids a text gets: pieces, scores, kind, rules. The model file also holds incidentals."""
        digest = hashlib.sha256()
        for i, piece in enumerate(self.pieces):
            digest.update(f"{piece}\t{self._processor.get_score(i):.5f}\n".encode())
        digest.update(json.dumps([self.config.kind, asdict(self.config.rules)], sort_keys=True).encode())
        return digest.hexdigest()[:16]


def _read_config(values: dict[str, Any]) -> TokenizerConfig:
    """The configuration written by `save`.

    Raises:
        TypeError, ValueError, KeyError: naming what is missing, unknown or of the wrong type.
    """
    config = TokenizerConfig(**{**values, "rules": RulesConfig(**values["rules"])})
    for given, default in ((config, TokenizerConfig()), (config.rules, RulesConfig())):
        for name, value in vars(default).items():
            found = getattr(given, name)
            if type(found) is not type(value) and not (isinstance(value, float) and type(found) is int):
                raise TypeError(f"{name} is {found!r:.40}")
    Rules(config.rules)  # its names are known
    return config


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
