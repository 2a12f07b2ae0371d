"""The AWD-LSTM encoder (Merity et al. 2017), the network both stages share (Howard & Ruder 2018, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ulmfit.config import DropoutConfig
from ulmfit.nn import bfloat16, compiled_lstm, cudnn, fused_layer, stepwise
from ulmfit.nn.compiled_lstm import CompiledLSTM
from ulmfit.nn.dropout import embedding_dropout, variational_dropout, weight_dropout
from ulmfit.nn.lookup import Lookups
from ulmfit.nn.tiles import missing_rows

# One (h, c) pair per layer, each (1, B, H_layer). The caller keeps it between calls and detaches it.
State = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Architecture:
    """What decides the shapes of all encoder weights; stored in the bundle."""

    vocab_size: int
    embedding_dim: int = 400
    hidden_dim: int = 1152
    num_layers: int = 3

    def layer_sizes(self) -> list[tuple[int, int]]:
        """(input, hidden) of each LSTM layer; the last returns to the embedding's size, so that weights can be tied."""
        widths = [self.embedding_dim] + [self.hidden_dim] * (self.num_layers - 1) + [self.embedding_dim]
        return list(pairwise(widths))


class AWDLSTM(nn.Module):
    """Embedding and LSTM layers with embedding, input, hidden and weight dropout.

    Weights: `embedding.weight` (V, E) and `rnns.{i}.{weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0}`.
    `dropout` is plain data and may be replaced at any time; `dropout.output` belongs to the decoder.
    """

    def __init__(self, architecture: Architecture, dropout: DropoutConfig | None = None) -> None:
        super().__init__()
        self.architecture = architecture
        self.dropout = dropout or DropoutConfig()
        self.embedding = nn.Embedding(architecture.vocab_size, architecture.embedding_dim)
        self.rnns = nn.ModuleList(nn.LSTM(i, h, batch_first=True) for i, h in architecture.layer_sizes())
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.twins: tuple[CompiledLSTM, ...] = ()  # of the layers, for batches of documents (`reduced.compile_for`)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> AWDLSTM:
        self.twins = ()  # weights are of another type or device now
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def rate(self, kind: str) -> float:
        """Dropout rate of `kind` (input, hidden, output, embedding, weight) after scaling; zero in eval mode."""
        if not self.training:
            return 0.0
        return min(float(getattr(self.dropout, kind)) * self.dropout.multiplier, 0.95)

    def forward(
        self, tokens: Tensor, state: State | None = None, lookups: Lookups | None = None
    ) -> tuple[Tensor, State]:
        """Read `tokens` (B, T) on from `state` (None: zeros) -> last layer's outputs (B, T, E) and the new state.

        `lookups` in the embedding's weight have one gradient for several calls.
        """
        compiled = self.compiled_layers
        if compiled:
            return compiled_lstm.read(compiled, self.embedding.weight, tokens, state)
        rows = tokens.size(0)
        missing = missing_rows(rows, self.embedding.weight.dtype, tokens.device)
        if missing and fused_layer.reads_in_bfloat16(self.rnns, tokens.device):
            missing = 0
        if missing:  # rows of zeros, cut off the outputs again
            tokens = F.pad(tokens, (0, 0, 0, missing))
            state = None if state is None else [(_more_rows(h, missing), _more_rows(c, missing)) for h, c in state]
        rate = self.rate("embedding")
        x = embedding_dropout(tokens, self.embedding.weight, rate, self.training, lookups=lookups)  # (B, T, E)
        x = variational_dropout(x, self.rate("input"), self.training)
        new_state: State = []
        for i, rnn in enumerate(self.rnns):
            if i > 0:
                x = variational_dropout(x, self.rate("hidden"), self.training)
            x, layer_state = self._run(rnn, x, None if state is None else state[i])  # (B, T, H_i)
            new_state.append(layer_state)
        if missing:
            x, new_state = x[:rows], [(h[:, :rows], c[:, :rows]) for h, c in new_state]
        return x, new_state

    def _run(
        self, rnn: nn.Module, x: Tensor, state: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if state is not None:
            state = (state[0].to(x.dtype), state[1].to(x.dtype))
        rate = self.rate("weight")
        # Below the lowest layer that trains nothing is kept for a backward pass; torch would still keep the gates.
        learns = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in rnn.parameters()))
        with torch.set_grad_enabled(learns):
            if stepwise.is_worth_it(rnn, x) and not (self.training and rate > 0):
                return stepwise.lstm(rnn, x, state)
            if x.device.type == "cuda" and self.training:
                return cudnn.lstm(rnn, weight_dropout(rnn.get_parameter("weight_hh_l0"), rate, True), x, state)
            kind = fused_layer.kind_for(rnn, x)
            if kind:
                return fused_layer.lstm(kind, rnn, rate, x, state)
            if bfloat16.is_worth_it(rnn, x):
                return bfloat16.lstm(rnn, rate, x, state)
            if self.training and rate > 0:
                # functional_call swaps the matrix for this call only: names, gradients and the fast kernels stay.
                dropped = {"weight_hh_l0": weight_dropout(rnn.get_parameter("weight_hh_l0"), rate, True)}
                output, after = functional_call(rnn, dropped, (x, state))
            else:
                output, after = rnn(x, state)
            return output, after

    @property
    def cheap_calls(self) -> bool:
        """Whether a call takes hardly longer than its steps: no layer lays out its weights in each of them."""
        return not any(isinstance(rnn, nn.LSTM) for rnn in self.rnns)

    @property
    def compiled_layers(self) -> list[CompiledLSTM]:
        """The layers if they are compiled loops; else none."""
        return [rnn for rnn in self.rnns if isinstance(rnn, CompiledLSTM)]

    @property
    def document_layers(self) -> list[CompiledLSTM]:
        """Compiled loops, if there are such, that read a whole batch of documents."""
        return self.compiled_layers or list(self.twins)

    def layers(self) -> list[nn.Module]:
        """[embedding, rnn 0, ..., rnn N-1], lowest first."""
        return [self.embedding, *self.rnns]


def _more_rows(part: Tensor, missing: int) -> Tensor:
    """(1, B, H) -> (1, B + missing, H)."""
    return F.pad(part, (0, 0, 0, missing))


def detach(state: State) -> State:
    """The same values without history: where back-propagation through time is cut."""
    return [(h.detach(), c.detach()) for h, c in state]


def select_rows(state: State, rows: Tensor) -> State:
    """State of some rows of the batch; `rows` (N,) int64."""
    return [(h.index_select(1, rows), c.index_select(1, rows)) for h, c in state]


def zeros_like_state(architecture: Architecture, batch: int, like: Tensor) -> State:
    """The state before the first token."""
    return [
        (torch.zeros(1, batch, h, device=like.device), torch.zeros(1, batch, h, device=like.device))
        for _, h in architecture.layer_sizes()
    ]
