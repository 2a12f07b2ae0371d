"""The two networks: a language model and a text classifier on the same encoder."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ulmfit.nn import compiled_lstm
from ulmfit.nn.awd_lstm import AWDLSTM, State, detach, select_rows
from ulmfit.nn.dropout import variational_dropout
from ulmfit.nn.heads import ClassifierHead, ConcatPool, TiedDecoder, kept_steps
from ulmfit.nn.lookup import Lookups
from ulmfit.nn.losses import activation_regularisation, chunked_cross_entropy, summed_cross_entropy

_TOKENS_A_CALL = 64  # about as many are read in the time that one more call of the encoder costs


class LMLoss(NamedTuple):
    """Cross-entropy in nats per token, the AR/TAR penalty added to it in training, and the new state."""

    cross_entropy: Tensor
    penalty: Tensor
    state: State


class LanguageModel(nn.Module):
    """Encoder and tied decoder: predicts the next piece."""

    def __init__(self, encoder: AWDLSTM) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = TiedDecoder(encoder.architecture.vocab_size)

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """(B, T) -> logits (B, T, V) and the new state."""
        raw, state = self.encoder(tokens, state)
        dropped = variational_dropout(raw, self.encoder.rate("output"), self.training)
        return self.decoder(dropped, self.encoder.embedding.weight), state

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: State | None = None,
        ar_alpha: float = 0.0,
        tar_beta: float = 0.0,
        chunk: int | None = None,
    ) -> LMLoss:
        """Loss of predicting `targets` (B, T) after `tokens` (B, T), never holding all logits."""
        raw, state = self.encoder(tokens, state)  # (B, T, E)
        dropped = variational_dropout(raw, self.encoder.rate("output"), self.training)
        hidden = dropped.reshape(-1, dropped.size(-1))  # (B * T, E)
        weight, bias = self.encoder.embedding.weight, self.decoder.bias
        cross_entropy = chunked_cross_entropy(hidden, weight, bias, targets.reshape(-1), chunk)
        penalty = activation_regularisation(dropped, raw, ar_alpha, tar_beta)
        return LMLoss(cross_entropy, penalty, state)

    @torch.no_grad()
    def total_nll(
        self, tokens: Tensor, targets: Tensor, state: State | None = None, chunk: int | None = None
    ) -> tuple[Tensor, State]:
        """Sum over all positions of the negative log-likelihood in nats (float64 scalar), and the new state."""
        raw, state = self.encoder(tokens, state)
        hidden = raw.reshape(-1, raw.size(-1))
        total = summed_cross_entropy(
            hidden, self.encoder.embedding.weight, self.decoder.bias, targets.reshape(-1), chunk
        )
        return total, state

    def layer_groups(self) -> list[nn.Module]:
        """[rnn 0, ..., rnn N-1, embedding + decoder], lowest first."""
        return [*self.encoder.rnns, nn.ModuleList([self.encoder.embedding, self.decoder])]


class Penalty(NamedTuple):
    """AR and TAR, each a mean, and over how many steps of documents and pairs of neighbouring steps."""

    ar: Tensor
    tar: Tensor
    steps: int
    pairs: int


class ClassifierOutput(NamedTuple):
    """Logits (B, C) and what AR/TAR add to the loss when training (zeros else)."""

    logits: Tensor
    parts: Penalty

    @property
    def penalty(self) -> Tensor:
        """AR and TAR together."""
        return self.parts.ar + self.parts.tar


class FirstStep(NamedTuple):
    """The encoder's output (1, 1, E) for the first token of a document, and the state after it."""

    hidden: Tensor
    state: State


class TextClassifier(nn.Module):
    """Encoder, concat pooling over chunks (BPT3C) and head.

    Args:
        bptt: tokens read at a time; gradients do not cross chunk borders.
        max_len: tokens from a document's end that are pooled and get gradients; memory in training is bounded by it.
    """

    def __init__(self, encoder: AWDLSTM, head: ClassifierHead, bptt: int = 70, max_len: int = 1400) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.bptt = bptt
        self.max_len = max_len

    @property
    def classes(self) -> int:
        """Number of logits."""
        return self.head.classes

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Right-padded `tokens` (B, T) of `lengths` (B,), on any device -> logits (B, C), the same in any batch."""
        return self.classify(tokens, lengths).logits

    def classify(
        self, tokens: Tensor, lengths: Tensor, ar_alpha: float = 0.0, tar_beta: float = 0.0
    ) -> ClassifierOutput:
        """Logits and the AR/TAR penalty over the pooled steps."""
        features, parts = self.pool(tokens, lengths, ar_alpha, tar_beta)
        return ClassifierOutput(self.head(features), parts)

    def pool(
        self, tokens: Tensor, lengths: Tensor, ar_alpha: float = 0.0, tar_beta: float = 0.0
    ) -> tuple[Tensor, Penalty]:
        """Features [last, max, mean] (B, 3 * E) and the AR/TAR penalty over pooled steps; TAR inside chunks.

        A chunk that no document pools is read without an autograd graph: "gradients are back-propagated to the
        batches whose hidden states contributed to the final prediction" (Howard & Ruder 2018, section 3.3).
        """
        order: Tensor | None = None  # batches to predict come sorted
        ends = lengths.tolist()  # from a GPU this waits for all it has to do, so they are better given on the CPU
        at_work = not self.training and not torch.is_grad_enabled()
        if at_work and ends == [tokens.size(1)] and ends[0] <= self.longest_at_once:
            return self._pool_at_once(tokens)
        compiled = self.encoder.document_layers
        if at_work and compiled and 0 < max(ends, default=0) <= self.max_len:
            zero, steps = torch.zeros(()), sum(ends)
            features = compiled_lstm.pooled(compiled, self.encoder.embedding.weight, tokens, lengths)
            return features, Penalty(zero, zero, steps, steps - len(ends))
        lengths = lengths.to(tokens.device, non_blocking=True)
        if any(before < after for before, after in pairwise(ends)):
            lengths, order = lengths.sort(descending=True, stable=True)
            tokens = tokens[order]
            ends.sort(reverse=True)
        pool = ConcatPool.empty(tokens.size(0), self.encoder.architecture.embedding_dim, tokens)
        pooled = [(max(n - self.max_len, 0), n) for n in ends]  # steps [first, end) of each document
        finished: list[Tensor] = []  # features of documents that ended, shortest first
        ar = tar = torch.zeros((), device=tokens.device)  # sums over what `all_steps` and `all_pairs` count
        all_steps = all_pairs = 0
        # (One chunk has one gradient anyway.)
        several = tokens.device.type == "cpu" and torch.is_grad_enabled() and tokens.size(1) > self.bptt
        lookups = Lookups(self.encoder.embedding.weight) if several else None
        state: State | None = None
        read = 0
        if at_work and self.encoder.cheap_calls and ends[0] <= self.max_len:
            read, pool, state = self._read_beginnings(tokens[:, : ends[-1]], pool)
            all_steps, all_pairs = all_steps + read * len(ends), all_pairs + max(0, read - 1) * len(ends)
        for start, stop in self._chunks([end for _, end in pooled], tokens.size(1), read):
            unread = max(1, sum(end > start for _, end in pooled))  # documents that go on
            if unread < len(pooled):
                finished.append(pool[unread:].features())
                pool, pooled, lengths = pool[:unread], pooled[:unread], lengths[:unread]
                state = None if state is None else [(h[:, :unread], c[:, :unread]) for h, c in state]
            chunk = tokens[:unread, start:stop]  # (B, t)
            position = torch.arange(start, start + chunk.size(1), device=tokens.device)
            inside = [min(end, start + chunk.size(1)) - max(first, start) for first, end in pooled]
            steps, pairs = sum(max(0, n) for n in inside), sum(max(0, n - 1) for n in inside)
            with torch.set_grad_enabled(torch.is_grad_enabled() and steps > 0):
                hidden, state = self.encoder(chunk, state, lookups)  # (B, t, E)
            state = detach(state)
            if steps == 0:
                continue
            all_steps, all_pairs = all_steps + steps, all_pairs + pairs
            whole, learns = steps == chunk.numel(), torch.is_grad_enabled()
            if learns and chunk.device.type == "cpu":
                pool, sums = pool.add_sums(hidden, position, lengths, self.max_len, whole)
                if self.training and (ar_alpha > 0 or tar_beta > 0):
                    ar = ar + ar_alpha / hidden.size(-1) * sums.squares
                    tar = tar + tar_beta / hidden.size(-1) * sums.moves
                continue
            # (Without masks gradients would add up in another order: other last digits.)
            whole = whole and not learns
            pool = pool.add_whole(hidden) if whole else pool.add(hidden, position, lengths, self.max_len)
            if self.training and (ar_alpha > 0 or tar_beta > 0):
                mask = kept_steps(position, lengths, self.max_len)
                ar = ar + steps * activation_regularisation(hidden, hidden, ar_alpha, 0.0, mask)
                tar = tar + pairs * activation_regularisation(hidden, hidden, 0.0, tar_beta, mask)
        features = torch.cat([pool.features(), *reversed(finished)])
        features = features if order is None else features[order.argsort()]
        return features, Penalty(ar / max(all_steps, 1), tar / max(all_pairs, 1), all_steps, all_pairs)

    def first_step(self, token: int) -> FirstStep:
        """What `after` needs of the first token of a document: the same for all documents that begin with it."""
        return FirstStep(*self.encoder(torch.tensor([[token]], device=self.encoder.embedding.weight.device)))

    def after(self, first: FirstStep, tokens: Tensor) -> Tensor:
        """Logits (1, C) of the document of `first` and then `tokens` (1, T), at work.

        Raises:
            ValueError: a document longer than what is read and pooled at a time.
        """
        if tokens.size(1) >= self.longest_at_once:
            raise ValueError(f"{tokens.size(1) + 1} tokens, expected at most {self.longest_at_once}")
        hidden, _ = self.encoder(tokens, first.state)
        logits: Tensor = self.head(_features(torch.cat([first.hidden, hidden], dim=1)))
        return logits

    @property
    def longest_at_once(self) -> int:
        """Tokens of a document that is read and pooled in one piece."""
        return min(self.bptt, self.max_len)

    def _pool_at_once(self, tokens: Tensor) -> tuple[Tensor, Penalty]:
        """What `pool` makes of one short document (1, T), in fewer operations: a tenth of its time."""
        features = _features(self.encoder(tokens)[0])
        zero = features.new_zeros(())
        return features, Penalty(zero, zero, tokens.size(1), tokens.size(1) - 1)

    def _read_beginnings(self, tokens: Tensor, pool: ConcatPool) -> tuple[int, ConcatPool, State | None]:
        """Read the first steps of `tokens` (B, T) as long as many documents are alike so far, each beginning once.

        Questions and short messages often begin with the same words: of 28,436 tokens of 2,000 questions of TREC-6 a
        fifth need not be read.

        Returns:
            The number of steps read, what is pooled and the state after them; for each of the documents.
        """
        size, rows = self.encoder.architecture.vocab_size, tokens.size(0)
        state: State | None = None
        group = torch.zeros(rows, dtype=torch.int64, device=tokens.device)  # the beginning of each document
        beginnings, step = pool[:1], 0
        while step < tokens.size(1):
            found, longer = torch.unique(group * size + tokens[:, step], return_inverse=True)
            if rows - len(found) <= _TOKENS_A_CALL:
                break
            group, before = longer, found // size
            hidden, state = self.encoder((found % size)[:, None], None if state is None else select_rows(state, before))
            beginnings = beginnings[before].add_whole(hidden)
            step += 1
        if step == 0:
            return 0, pool, None
        return step, beginnings[group], None if state is None else select_rows(state, group)

    def _chunks(self, ends: list[int], steps: int, read: int = 0) -> list[tuple[int, int]]:
        """[first, end) of the steps to read at a time, after `read`; documents end at `ends`, the last first."""
        if not self.training and self.encoder.cheap_calls:
            return chunks_with_little_padding(ends, self.bptt, read)
        return [(start, start + self.bptt) for start in range(read, steps, self.bptt)]

    def layer_groups(self) -> list[nn.Module]:
        """[embedding, rnn 0, ..., rnn N-1, head], lowest first."""
        return [*self.encoder.layers(), self.head]


def _features(hidden: Tensor) -> Tensor:
    """Concat pooling of one whole document (1, T, E)."""
    hidden = hidden.float()
    return torch.cat([hidden[:, -1], hidden.amax(1), hidden.sum(1) / hidden.size(1)], dim=1)


def chunks_with_little_padding(
    ends: list[int], most: int, start: int = 0, call: int = _TOKENS_A_CALL
) -> list[tuple[int, int]]:
    """Cut the steps of documents that end at `ends`, the last first, so that those that ended are soon left out.

    Args:
        most: steps of a chunk.
        start: steps read before.
        call: so many tokens of a chunk may be padding, or of a large one, of every 1,024.
    """
    chunks: list[tuple[int, int]] = []
    unread = sum(end > start for end in ends)
    while start < ends[0]:
        stop, padding, limit = start, 0, min(start + most, ends[0])
        for ended, end in enumerate(reversed(ends[:unread])):
            end = min(end, limit)
            padding += ended * (end - stop)
            if padding > call * max(1, unread * (end - start) / 1024):
                break
            stop = end
        chunks.append((start, stop))
        start, unread = stop, sum(end > stop for end in ends[:unread])
    return chunks
