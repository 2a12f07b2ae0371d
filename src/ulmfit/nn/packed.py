"""LSTM layers at work whose weights stay as oneDNN lays them out, which otherwise happens anew in every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ulmfit.nn.awd_lstm import AWDLSTM
from ulmfit.nn.processor import onednn_has

_LSTM = 2  # torch's number for this kind of recurrent layer


def pack_weights(encoder: AWDLSTM) -> None:
    """Let the LSTMs of `encoder`, in place and for good, keep their weights in oneDNN's layout; no more training then.

    Outputs stay the same to the last bit. Nothing happens where torch does not multiply with oneDNN.
    """
    if encoder.embedding.weight.device.type == "cpu" and onednn_has("_reorder_mkldnn_rnn_layer_weight"):
        encoder.rnns = nn.ModuleList(PackedLSTM(rnn) if isinstance(rnn, nn.LSTM) else rnn for rnn in encoder.rnns)


class PackedLSTM(nn.Module):
    """A layer in eval mode, its weights a second time in oneDNN's layout; `forward` is that of `nn.LSTM`.

    The layout is made in the first call and never copied or saved: a copy makes its own.
    """

    def __init__(self, rnn: nn.LSTM) -> None:
        super().__init__()
        self.rnn, self.hidden_size = rnn, rnn.hidden_size
        self._packed: tuple[Tensor, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedLSTM:
        self._packed = None  # of another type or device now
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, I) -> outputs (B, T, H) and the state ((1, B, H), (1, B, H))."""
        if not _applies(x):
            output, after = self.rnn(x, state)
            return output, after
        packed = self._packed or self._pack()
        if state is None:
            h = c = x.new_zeros(1, x.size(0), self.hidden_size)
        else:
            h, c = state[0].contiguous(), state[1].contiguous()
        steps = x.transpose(0, 1).contiguous()
        output, h, c, _ = torch.ops.aten.mkldnn_rnn_layer(
            steps, *packed, h, c, False, [], _LSTM, self.hidden_size, 1, True, False, False, False
        )
        return output.transpose(0, 1), (h, c)

    def _pack(self) -> tuple[Tensor, ...]:
        """The two matrices in oneDNN's layout and the two biases."""
        first, second, *biases = (p.detach() for p in self.rnn.parameters())
        with torch.no_grad():
            matrices = torch.ops.mkldnn._reorder_mkldnn_rnn_layer_weight(
                first, second, self.hidden_size, False, True, False
            )
        self._packed = (*matrices, *biases)
        return self._packed


def _applies(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and x.dtype in (torch.float32, torch.bfloat16)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
    )
