"""Networks from bundles, weights by name, and the transfer of a vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ulmfit.bundle import Bundle, BundleInfo, load_bundle, save_bundle
from ulmfit.config import ClassifierConfig, DropoutConfig, TokenizerConfig
from ulmfit.errors import BundleError
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.build import (
    TransferReport,
    language_model_from,
    load_named,
    new_text_classifier,
    text_classifier_from,
    transfer_vocabulary,
)
from ulmfit.nn.models import LanguageModel, TextClassifier
from ulmfit.text.tokenizer import Tokenizer

OLD = ["<pad>", "<unk>", "<bos>", "the", "cat", "sat"]
NEW = ["<bos>", "<pad>", "<unk>", "a", "cat", "mat", "the", "on"]


def language_model(vocab: int = len(OLD)) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(AWDLSTM(Architecture(vocab, 4, 5, 2), DropoutConfig(hidden=0.33)))
    torch.nn.init.normal_(model.decoder.bias)
    return model.eval()


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class TestTransferVocabulary:
    def test_matching_pieces_keep_row_and_bias_and_new_ones_get_the_mean(self) -> None:
        model = language_model()
        rows, bias = model.encoder.embedding.weight, model.decoder.bias
        result, report = transfer_vocabulary(model, OLD, NEW)
        for i, piece in enumerate(NEW):
            if piece in OLD:
                row, value = rows[OLD.index(piece)], bias[OLD.index(piece)]
                assert torch.equal(result.encoder.embedding.weight[i], row), piece
                assert result.decoder.bias[i] == value, piece
            else:
                assert torch.allclose(result.encoder.embedding.weight[i], rows.mean(0)), piece
                assert result.decoder.bias[i].item() == pytest.approx(bias.mean().item()), piece
        assert report == TransferReport(matched=5, total=8)
        assert str(report) == "5 of 8 pieces kept their embedding, 3 start from the mean"

    def test_the_rest_of_the_network_is_the_same(self) -> None:
        model = language_model()
        result, _ = transfer_vocabulary(model, OLD, NEW)
        assert asdict(result.encoder.architecture) == asdict(model.encoder.architecture) | {"vocab_size": 8}
        assert result.encoder.dropout == model.encoder.dropout
        rnns = weights(model.encoder.rnns)
        assert all(torch.equal(tensor, rnns[name]) for name, tensor in result.encoder.rnns.state_dict().items())

    def test_known_text_reads_the_same(self) -> None:
        model = language_model()
        result, _ = transfer_vocabulary(model, OLD, NEW)
        text = ["<bos>", "the", "cat", "the"]
        before, _ = model.encoder(torch.tensor([[OLD.index(piece) for piece in text]]))
        after, _ = result.eval().encoder(torch.tensor([[NEW.index(piece) for piece in text]]))
        assert torch.equal(before, after)

    def test_the_same_vocabulary_changes_nothing_and_the_old_model_stays_whole(self) -> None:
        model = language_model()
        before = weights(model)
        result, report = transfer_vocabulary(model, OLD, OLD)
        assert report.matched == report.total == 6
        assert all(torch.equal(tensor, before[name]) for name, tensor in result.state_dict().items())
        with torch.no_grad():
            for p in result.parameters():
                p.zero_()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_no_piece_in_common(self) -> None:
        model = language_model()
        result, report = transfer_vocabulary(model, OLD, ["x", "y"])
        assert report.matched == 0
        mean = model.encoder.embedding.weight.mean(0)
        assert torch.allclose(result.encoder.embedding.weight, mean.expand(2, 4))


class TestLoadNamed:
    def test_names_decide_not_positions(self) -> None:
        """Two layers of equal shape, given in the other order, land where their names say."""
        module = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
        tensors = dict(reversed(weights(module).items()))
        load_named(module, {name: tensor + 1 for name, tensor in tensors.items()}, "the network")
        assert all(torch.equal(tensor, tensors[name] + 1) for name, tensor in module.state_dict().items())

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (
                lambda w: {k: v for k, v in w.items() if k != "rnns.1.weight_hh_l0"},
                "the encoder of here lacks 'rnns.1.weight_hh_l0'; the file is not from this kind of network",
            ),
            (
                lambda w: {**w, "rnns.2.weight_hh_l0": torch.zeros(1)},
                "the encoder of here has an unknown weight 'rnns.2.weight_hh_l0'; "
                "the file is not from this kind of network",
            ),
            (
                lambda w: {**w, "embedding.weight": torch.zeros(7, 4)},
                "the encoder of here: 'embedding.weight' has shape (7, 4), expected (6, 4); "
                "the file is from a network of another shape",
            ),
            (lambda w: {}, "the encoder of here lacks 'embedding.weight'; the file is not from this kind of network"),
        ],
        ids=["missing", "unknown", "shape", "empty"],
    )
    def test_errors_name_the_weight_and_leave_the_network_alone(
        self, damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
    ) -> None:
        module = language_model().encoder
        before = weights(module)
        with pytest.raises(BundleError) as caught:
            load_named(module, damage({name: tensor + 1 for name, tensor in before.items()}), "the encoder of here")
        assert str(caught.value) == message
        assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = ["The cat sat on the mat.", "A printer that prints.", "Please reset my password!"] * 4
    return Tokenizer.train(texts, TokenizerConfig(vocab_size=320))


class TestFromBundles:
    tokens = torch.tensor([[2, 7, 9, 30, 5, 6], [2, 8, 8, 4, 0, 0]])
    lengths = torch.tensor([6, 4])

    def language_bundle(self, folder: Path, tokenizer: Tokenizer) -> tuple[LanguageModel, Bundle]:
        model = language_model(tokenizer.vocab_size)
        info = BundleInfo("language_model", asdict(model.encoder.architecture))
        save_bundle(folder / "lm", info, model.encoder.state_dict(), model.decoder.state_dict(), tokenizer)
        return model, load_bundle(folder / "lm")

    def classifier_bundle(self, folder: Path, tokenizer: Tokenizer) -> tuple[TextClassifier, Bundle]:
        encoder = language_model(tokenizer.vocab_size).encoder
        config = ClassifierConfig(bptt=3, max_len=4, head_hidden=7, head_dropout=[0.2, 0.3])
        model = new_text_classifier(encoder, 2, config)
        assert model.head.dropout == (0.2, 0.3) and (model.bptt, model.max_len) == (3, 4)
        model.head.train()(torch.randn(9, 12))  # running statistics, which are saved as well
        info = BundleInfo(
            "classifier",
            asdict(encoder.architecture),
            labels=["no", "yes"],
            pooling={"bptt": 3, "max_len": 4, "head_hidden": 7},
        )
        save_bundle(folder / "clf", info, encoder.state_dict(), model.head.state_dict(), tokenizer)
        return model.eval(), load_bundle(folder / "clf")

    def test_language_model(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        model, bundle = self.language_bundle(tmp_path, tokenizer)
        dropout = DropoutConfig(hidden=0.5)
        loaded = language_model_from(bundle, dropout).eval()
        assert loaded.encoder.dropout is dropout
        assert torch.equal(loaded(self.tokens)[0], model(self.tokens)[0])

    def test_classifier(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        model, bundle = self.classifier_bundle(tmp_path, tokenizer)
        loaded = text_classifier_from(bundle).eval()
        assert torch.equal(loaded(self.tokens, self.lengths), model(self.tokens, self.lengths))

    def test_language_model_from_a_classifier_takes_the_encoder(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        model, bundle = self.classifier_bundle(tmp_path, tokenizer)
        loaded = language_model_from(bundle).eval()
        assert torch.equal(loaded.encoder(self.tokens)[0], model.encoder(self.tokens)[0])
        assert not loaded.decoder.bias.any()

    def test_classifier_from_a_language_model_is_an_error(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        _, bundle = self.language_bundle(tmp_path, tokenizer)
        with pytest.raises(BundleError, match="is a language model, expected a classifier; train one with"):
            text_classifier_from(bundle)

    def test_an_encoder_moves_from_language_model_to_classifier_by_name(
        self, tmp_path: Path, tokenizer: Tokenizer
    ) -> None:
        model, bundle = self.language_bundle(tmp_path, tokenizer)
        encoder = AWDLSTM(Architecture(**bundle.info.architecture))
        load_named(encoder, bundle.encoder, "the encoder")
        moved = new_text_classifier(encoder, 2, ClassifierConfig()).eval()
        assert torch.equal(moved.encoder(self.tokens)[0], model.encoder(self.tokens)[0])

    def test_a_damaged_bundle_names_the_file_and_the_weight(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        _, bundle = self.language_bundle(tmp_path, tokenizer)
        del bundle.encoder["rnns.0.bias_ih_l0"]
        with pytest.raises(BundleError, match=r"the encoder of .*lm lacks 'rnns\.0\.bias_ih_l0'"):
            language_model_from(bundle)
