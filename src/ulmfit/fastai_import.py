"""Language models from fastai: weights by name and shape, vocabularies by string; nothing in the files is executed.

fastai reads words and this package reads pieces, so a piece that is a word takes over the word's row.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ulmfit.bundle import LANGUAGE_MODEL, BundleInfo, save_bundle
from ulmfit.errors import BundleError
from ulmfit.fastai_weights import FastaiWeights, read_fastai_checkpoint
from ulmfit.nn.awd_lstm import AWDLSTM
from ulmfit.nn.build import TransferReport, load_named, transfer_vocabulary
from ulmfit.nn.models import LanguageModel
from ulmfit.pickled_data import read_pickled_data
from ulmfit.text.rules import CAPITALISED, NEWLINE, UPPER
from ulmfit.text.tokenizer import Tokenizer

__all__ = [
    "FastaiWeights",
    "language_model_from_fastai",
    "read_fastai_checkpoint",
    "read_fastai_vocabulary",
    "save_imported",
    "words_of_pieces",
]

_SPACE = "\u2581"  # SentencePiece's sign for the space before a word
# The same token in fastai 2 and 1, then in 0.7.
_BEGIN, _UNKNOWN, _PADDING = ("xxbos", "xbos"), ("xxunk", "_unk_"), ("xxpad", "_pad_")
_MARKER_WORDS = {CAPITALISED: ("xxmaj",), UPPER: ("xxup", "t_up"), NEWLINE: ("\n",)}


def read_fastai_vocabulary(path: Path | str) -> list[str]:
    """The words of a fastai model in the order of its embedding's rows.

    Reads a pickled list of words (`itos.pkl`), a list of words and labels (a classifier's `dls.vocab`), a dictionary
    word -> id, or one that holds such a list; the same as `.json`; or a `.txt` with one word a line.

    Raises:
        BundleError: if it is something else. A pickle that would build any other object is refused, not run.
    """
    path = Path(path)
    expected = "expected a pickled list of words, a .json list, or a .txt with one word a line"
    try:
        content = path.read_bytes()
        if path.suffix == ".txt":
            text = content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n")
            return _words(text.split("\n") if text else [])
        value = json.loads(content) if path.suffix == ".json" else read_pickled_data(content)
        return _words(value)
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}); {expected}") from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not a vocabulary: {error!s:.200}; {expected}") from error


def language_model_from_fastai(
    weights: FastaiWeights, vocabulary: Sequence[str], tokenizer: Tokenizer
) -> tuple[LanguageModel, TransferReport]:
    """A language model for `tokenizer`: the LSTMs as they are, the rows of pieces from the words they equal.

    Pieces that are no word of the vocabulary get the mean row; see `words_of_pieces`.

    Raises:
        BundleError: if the vocabulary has not one word for each row.
    """
    if len(vocabulary) != weights.architecture.vocab_size:
        raise BundleError(
            f"the vocabulary has {len(vocabulary)} words, expected {weights.architecture.vocab_size}, one for each row "
            "of the embedding; use the vocabulary saved with these weights"
        )
    model = LanguageModel(AWDLSTM(weights.architecture))
    load_named(model.encoder, weights.encoder, "fastai's encoder")
    if weights.decoder_bias is not None:
        load_named(model.decoder, {"bias": weights.decoder_bias}, "fastai's decoder")
    nothing = max(vocabulary, key=len) + "?"  # longer than every word, so that it equals none
    words = words_of_pieces(vocabulary, tokenizer)
    return transfer_vocabulary(model, vocabulary, [nothing if word is None else word for word in words])


def words_of_pieces(vocabulary: Collection[str], tokenizer: Tokenizer) -> list[str | None]:
    """For each piece the word of a fastai vocabulary that says the same, or None.

    The begin, unknown and padding pieces and the markers of upper case match fastai's special tokens, whatever they are
    called in its version. A piece at the start of a word matches the word, first as it is, then in lower case; so does
    punctuation, which fastai always splits off. In a vocabulary that is itself of SentencePiece pieces, the same pieces
    match, wherever in a word they stand.
    """
    known = frozenset(vocabulary)
    subwords = sum(word.startswith(_SPACE) for word in vocabulary) > len(vocabulary) / 10
    special = {tokenizer.bos_id: _BEGIN, tokenizer.unk_id: _UNKNOWN, tokenizer.pad_id: _PADDING}
    words: list[str | None] = []
    for i, piece in enumerate(tokenizer.pieces):
        if i in special:
            candidates = _either_start(special[i])
        else:
            candidates = [] if tokenizer.is_byte(i) else _candidates(piece, subwords)
        words.append(next((word for word in candidates if word in known), None))
    return words


def save_imported(
    checkpoint: Path | str,
    vocabulary: Path | str,
    tokenizer: Tokenizer | Path | str,
    folder: Path | str,
    direction: str = "forward",
) -> TransferReport:
    """Write fastai's language model (or a classifier's encoder) as a bundle, ready for `init=`.

    Args:
        checkpoint: see `read_fastai_checkpoint`.
        vocabulary: see `read_fastai_vocabulary`.
        tokenizer: the pieces the bundle reads; or a folder that holds them, such as another bundle.
        direction: "backward" for a model that read backward.

    Raises:
        BundleError: if a file cannot be used, or `folder` holds something else.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)
    weights = read_fastai_checkpoint(checkpoint)
    model, report = language_model_from_fastai(weights, read_fastai_vocabulary(vocabulary), tokenizer)
    provenance = {"stage": "import", "checkpoint": Path(checkpoint).name, "transfer": str(report)}
    info = BundleInfo(LANGUAGE_MODEL, asdict(model.encoder.architecture), direction, provenance=provenance)
    save_bundle(folder, info, model.encoder.state_dict(), model.decoder.state_dict(), tokenizer)
    return report


def _words(value: object) -> list[str]:
    """The list of words in what a vocabulary file held.

    Raises:
        ValueError: saying what it is instead.
    """
    if isinstance(value, dict):
        ids: dict[Any, Any] = value
        if ids and all(isinstance(i, int) for i in ids.values()):
            words = sorted(ids, key=lambda word: int(ids[word]))
            if [ids[word] for word in words] != list(range(len(words))):
                raise ValueError(f"its {len(words)} numbers are not the ids 0 to {len(words) - 1}")
            return _words(words)
        inner = next((value[key] for key in ("vocab", "itos", "words") if key in value), None)
        if inner is None or isinstance(inner, dict):
            raise ValueError("its dictionary holds no ids of words, and no list under 'vocab', 'itos' or 'words'")
        return _words(inner)
    if isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], list | tuple):
        value = value[0]  # words and labels
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"it holds {'no words' if isinstance(value, list | tuple) else type(value).__name__}")
    for i, word in enumerate(value):
        if not isinstance(word, str):
            raise ValueError(f"entry {i} is of type {type(word).__name__}")
    return list(value)


def _candidates(piece: str, subwords: bool) -> list[str]:
    """Words that say what `piece` says, the best first."""
    bare = piece.removeprefix(_SPACE)
    if bare in _MARKER_WORDS:
        return _either_start(_MARKER_WORDS[bare])
    word = bare[1:] if bare[:1] in (CAPITALISED, UPPER) else bare
    starts = bare != piece
    if subwords:
        return [piece, (_SPACE if starts else "") + word]
    if starts or word != bare or not bare[:1].isalnum():
        return [word, word.lower()]
    return []


def _either_start(words: Sequence[str]) -> list[str]:
    """Special tokens as words and, in a vocabulary of pieces, as the pieces their text became."""
    return [start + word for word in words for start in (_SPACE, "")]
