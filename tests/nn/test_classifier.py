"""Pooling over chunks (BPT3C): a document's logits, gradients and kept tokens do not depend on its batch."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ulmfit.config import ClassifierConfig, DropoutConfig
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture, State, detach
from ulmfit.nn.build import new_text_classifier
from ulmfit.nn.heads import ClassifierHead
from ulmfit.nn.models import TextClassifier

VOCAB = 40


def classifier(bptt: int = 10, max_len: int = 30, vocab: int = VOCAB, **dropout: float) -> TextClassifier:
    """A small classifier in eval mode, whose batch norms have seen something; no dropout unless given."""
    torch.manual_seed(0)
    encoder = AWDLSTM(Architecture(vocab, 6, 8, 2), DropoutConfig(**{**dict.fromkeys(NAMES, 0.0), **dropout}))
    model = new_text_classifier(encoder, 3, ClassifierConfig(bptt=bptt, max_len=max_len, head_hidden=5))
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.6)  # states that differ between documents and steps
    model.head.train()(torch.randn(64, 18))
    return model.eval()


NAMES = ("input", "hidden", "output", "embedding", "weight")


def documents(lengths: Sequence[int], seed: int = 0, vocab: int = VOCAB) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.integers(3, vocab, n)) for n in lengths]


def batch(docs: Sequence[Tensor], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded (B, T) and lengths (B,)."""
    padded = torch.nn.utils.rnn.pad_sequence(list(docs), batch_first=True, padding_value=pad)
    return padded, torch.tensor([len(d) for d in docs])


def reference_features(model: TextClassifier, doc: Tensor) -> Tensor:
    """[last, max, mean] of one document by the definition: chunks, cut gradients, the last `max_len` steps."""
    state: State | None = None
    outputs = []
    for chunk in doc.split(model.bptt):
        out, state = model.encoder(chunk[None], state)
        state = detach(state)
        outputs.append(out[0])
    kept = torch.cat(outputs)[-model.max_len :]
    return torch.cat([kept[-1], kept.amax(0), kept.mean(0)])


LENGTHS = [1, 9, 10, 11, 29, 30, 31, 39, 40, 41, 75, 100]


class TestPooling:
    def test_equals_the_definition(self) -> None:
        model = classifier()
        docs = documents(LENGTHS)
        features, _ = model.pool(*batch(docs))
        expected = torch.stack([reference_features(model, doc) for doc in docs])
        assert torch.allclose(features, expected, atol=1e-6)

    def test_kept_tokens_are_the_last_max_len_whatever_the_batch(self) -> None:
        """All but one step in the middle of the kept ones is near zero: the mean counts the steps.

        fastai keeps whole chunks, counted from the end of the longest document (see tests/parity).
        """
        model = classifier()
        for beside in ([], [41], [200], [1, 57]):
            docs = documents([100, *beside])
            features, _ = model.pool(*batch(docs))
            assert torch.allclose(features[0], reference_features(model, docs[0]), atol=1e-6)

    def test_tokens_before_max_len_still_give_context(self) -> None:
        model = classifier()
        doc = documents([60])[0]
        other = torch.cat([doc[:29].flip(0), doc[29:]])
        assert not torch.allclose(model.pool(*batch([doc]))[0], model.pool(*batch([other]))[0], atol=1e-6)

    def test_padding_value_and_width_do_not_matter(self) -> None:
        model = classifier()
        docs = documents([3, 14])
        expected = model(*batch(docs))
        tokens, lengths = batch(docs, pad=7)
        assert torch.allclose(model(F.pad(tokens, (0, 55), value=9), lengths), expected, atol=1e-6)

    @pytest.mark.parametrize("tokens", [torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)])
    def test_a_document_without_tokens_has_zero_features(self, tokens: Tensor) -> None:
        """fastai divides by its length, zero."""
        model = classifier()
        lengths = torch.tensor([0, tokens.size(1)])
        features, _ = model.pool(tokens, lengths)
        assert torch.equal(features[0], torch.zeros(18))
        model.train()(tokens, lengths).sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)

    def test_an_empty_document_is_its_begin_marker(self) -> None:
        model = classifier()
        docs = [torch.tensor([2]), *documents([50])]
        assert torch.allclose(model(*batch(docs))[:1], model(*batch(docs[:1])), atol=1e-6)
        assert torch.isfinite(model(*batch(docs))).all()


@pytest.mark.slow
def test_any_batch_gives_each_document_the_same_logits() -> None:
    """2,000 documents of 1 to 3,000 tokens, bptt 70 and max_len 1,400 as configured, alone and in random batches.

    Embedding 6, hidden 8, 2 layers; 94 % of the documents are short (1 to 100 tokens), 6 % 1 to 3,000, and the
    batches of 1 to 200 mix them. fastai changes the features of a third of such documents (see tests/parity).
    """
    model = classifier(bptt=70, max_len=1400)
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(2000) < 0.06, rng.integers(1, 3001, 2000), rng.integers(1, 101, 2000))
    lengths[:6] = [1, 69, 70, 71, 1400, 3000]
    docs = documents(lengths.tolist())
    order = rng.permutation(2000)
    borders = [0, *np.sort(rng.choice(np.arange(1, 2000), 61, replace=False)).tolist(), 2000]
    with torch.no_grad():
        features = torch.cat([model.pool(*batch([doc]))[0] for doc in docs])
        model.head.dropout = (0.0, 0.0)
        for norm in model.head.norms:
            norm.momentum = 1.0
        model.head.train()(features)  # statistics of just these documents, so that their logits differ
        alone = model.head.eval()(features)
        assert alone.std(0).min() > 0.1
        together = torch.full_like(alone, torch.nan)
        for a, b in pairwise(borders):
            together[order[a:b]] = model(*batch([docs[i] for i in order[a:b]]))
    assert (together - alone).abs().max() < 1e-5


def test_any_batch_for_any_bptt_and_max_len() -> None:
    rng = np.random.default_rng(1)
    for seed in range(30):
        model = classifier(bptt=int(rng.integers(1, 25)), max_len=int(rng.integers(1, 60)))
        docs = documents(rng.integers(1, 90, int(rng.integers(2, 12))).tolist(), seed)
        with torch.no_grad():
            together = model(*batch(docs))
            alone = torch.cat([model(*batch([doc])) for doc in docs])
        assert (together - alone).abs().max() < 1e-5, (model.bptt, model.max_len, [len(d) for d in docs])


class TestGradients:
    def test_equal_the_definition_and_do_not_depend_on_the_batch(self) -> None:
        docs = documents([1, 10, 31, 45, 75])
        upstream = torch.randn(5, 18, generator=torch.Generator().manual_seed(2))
        model, reference = classifier(), classifier()
        model.pool(*batch(docs))[0].backward(upstream)
        torch.stack([reference_features(reference, doc) for doc in docs]).backward(upstream)
        for (name, p), q in zip(model.encoder.named_parameters(), reference.encoder.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None
            assert torch.allclose(p.grad, q.grad, atol=1e-5), name

    def test_reach_only_the_chunks_that_are_pooled(self) -> None:
        """Every token occurs once, so a row of the embedding's gradient belongs to a position."""
        model = classifier(bptt=10, max_len=25, vocab=203)
        doc = torch.arange(3, 103)
        model.pool(*batch([doc]))[0].sum().backward()
        assert model.encoder.embedding.weight.grad is not None
        reached = model.encoder.embedding.weight.grad[doc].abs().sum(1) > 0
        # Steps 75 to 99 are pooled; 70 to 74 are read in the same chunk as 75.
        assert reached.tolist() == [False] * 70 + [True] * 30

    def test_do_not_cross_chunk_borders(self) -> None:
        """Only the last step is pooled and it opens a chunk: nothing but its own token gets a gradient."""
        model = classifier(bptt=10, max_len=1, vocab=203)
        doc = torch.arange(3, 44)  # 41 tokens
        model.pool(*batch([doc]))[0].sum().backward()
        assert model.encoder.embedding.weight.grad is not None
        reached = model.encoder.embedding.weight.grad.abs().sum(1) > 0
        assert reached.nonzero().flatten().tolist() == [43]

    def saved(self, model: TextClassifier, lengths: list[int]) -> int:
        """Numbers that autograd keeps for the backward pass."""
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.classify(*batch(documents(lengths)))
        return kept

    def test_memory_is_bounded_by_max_len(self) -> None:
        model = classifier()
        assert self.saved(model, [1030]) == self.saved(model, [330]) == self.saved(model, [50])
        assert self.saved(model, [30]) < self.saved(model, [31])  # 3 chunks, 4 chunks

    def test_a_chunk_that_no_document_pools_builds_no_graph(self) -> None:
        """Neither before the kept part nor between a short document's end and a long one's kept part."""
        model = classifier()
        assert self.saved(model, [1030, 1030]) == self.saved(model, [330, 330])
        assert self.saved(model, [1030, 5]) == self.saved(model, [330, 5])
        assert self.saved(model, [330, 5]) > self.saved(model, [330, 330])  # the short one's chunk

    def test_no_graph_without_gradients(self) -> None:
        with torch.no_grad():
            assert not classifier()(*batch(documents([20]))).requires_grad


class TestTraining:
    def test_a_last_batch_of_one(self) -> None:
        """Batch norm cannot use the variance of one row (fastai and torch raise): it uses the running statistics."""
        model = classifier()
        model.head.dropout = (0.0, 0.0)
        docs = documents([12])
        expected = model(*batch(docs))
        before = copy.deepcopy(dict(model.head.named_buffers()))
        logits = model.train()(*batch(docs))
        assert torch.allclose(logits, expected, atol=1e-6)
        assert all(torch.equal(value, before[name]) for name, value in model.head.named_buffers())
        F.cross_entropy(logits, torch.tensor([1])).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())

    def test_a_batch_of_two_uses_and_updates_batch_statistics(self) -> None:
        model = classifier()
        running = model.head.norms[0].running_mean.clone()
        model.train()(*batch(documents([12, 30])))
        assert not torch.equal(model.head.norms[0].running_mean, running)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_weights_of_another_precision(self, dtype: torch.dtype) -> None:
        """`trainer.precision=bf16-true` and `64-true` convert the network."""
        model = classifier()
        tokens, lengths = batch(documents([12, 30, 1]))
        expected = model(tokens, lengths)
        converted = model.to(dtype)(tokens, lengths)
        assert converted.dtype == dtype
        assert torch.allclose(converted.float(), expected, atol=0.1 if dtype == torch.bfloat16 else 1e-5)
        for rows in (3, 1):
            F.cross_entropy(
                model.train()(tokens[:rows], lengths[:rows]), torch.zeros(rows, dtype=torch.int64)
            ).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())

    def test_dropout_draws_new_masks_for_each_chunk(self) -> None:
        """The same token in every step: without a new mask the second chunk would repeat the first's zeros."""
        model = classifier(bptt=10, input=0.5).train()
        seen: list[Tensor] = []
        model.encoder.rnns[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model.pool(torch.full((1, 20), 5), torch.tensor([20]))
        assert not torch.equal(seen[0] == 0, seen[1] == 0)

    def test_deepcopy_after_a_training_step(self) -> None:
        model = classifier(weight=0.5).train()
        tokens, lengths = batch(documents([12, 30]))
        F.cross_entropy(model(tokens, lengths), torch.tensor([0, 1])).backward()
        twin = copy.deepcopy(model)
        assert torch.equal(twin.eval()(tokens, lengths), model.eval()(tokens, lengths))

    def test_layer_groups_hold_each_parameter_once_lowest_first(self) -> None:
        model = classifier()
        groups = model.layer_groups()
        assert groups == [model.encoder.embedding, *model.encoder.rnns, model.head]
        assert [id(p) for group in groups for p in group.parameters()] == [id(p) for p in model.parameters()]


class TestPenalty:
    def outputs(self, model: TextClassifier, doc: Tensor) -> list[Tensor]:
        state: State | None = None
        chunks = []
        for chunk in doc.split(model.bptt):
            out, state = model.encoder(chunk[None], state)
            chunks.append(out[0])
        return chunks

    def test_is_the_mean_over_pooled_steps(self) -> None:
        """A last chunk of one token weighs one token, and what lies before max_len nothing."""
        model = classifier(max_len=25).train()
        docs = documents([41, 8])
        penalty = model.classify(*batch(docs), ar_alpha=2.0).penalty
        rows = torch.cat([torch.cat(self.outputs(model, doc))[-25:] for doc in docs]).detach()
        assert penalty.item() == pytest.approx(2 * rows.pow(2).mean().item(), rel=1e-5)

    def test_differences_are_taken_inside_chunks(self) -> None:
        model = classifier(max_len=100).train()
        doc = documents([20])[0]
        penalty = model.classify(*batch([doc]), tar_beta=1.0).penalty
        steps = torch.cat([chunk[1:] - chunk[:-1] for chunk in self.outputs(model, doc)])
        assert penalty.item() == pytest.approx(steps.pow(2).mean().item(), rel=1e-5)

    def test_only_in_training(self) -> None:
        penalty = classifier().classify(*batch(documents([20])), ar_alpha=2.0, tar_beta=1.0).penalty
        assert penalty.item() == 0


def test_head_is_two_blocks_of_norm_dropout_linear() -> None:
    head = ClassifierHead(18, 50, 3)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "norms.0.weight": (18,),
        "norms.0.bias": (18,),
        "norms.1.weight": (50,),
        "norms.1.bias": (50,),
        "linears.0.weight": (50, 18),
        "linears.1.weight": (3, 50),
    }
    x = torch.randn(7, 18)
    head.eval()
    hidden = head.linears[0](head.norms[0](x)).relu()
    assert torch.allclose(head(x), head.linears[1](head.norms[1](hidden)), atol=1e-6)
