"""The training call of cuDNN's LSTM, whose arithmetic a CPU has as well; `test_cuda.py` runs it on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ulmfit.nn import cudnn


@pytest.mark.parametrize("with_state", [False, True])
def test_outputs_and_gradients_are_those_of_the_layer(with_state: bool) -> None:
    torch.manual_seed(0)
    rnn = nn.LSTM(5, 7, batch_first=True)
    x = torch.randn(3, 4, 5, requires_grad=True)
    state = (torch.randn(1, 3, 7), torch.randn(1, 3, 7)) if with_state else None
    inputs = [x, *rnn.parameters()]
    found = []
    for output, (h, c) in (cudnn.lstm(rnn, rnn.weight_hh_l0, x, state), rnn(x, state)):
        gradients = torch.autograd.grad(output.square().sum() + c.sum(), inputs)
        found.append([output, h, c, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_another_matrix_for_one_call() -> None:
    torch.manual_seed(1)
    rnn = nn.LSTM(5, 7, batch_first=True)
    x, other = torch.randn(2, 3, 5), torch.zeros(28, 7)
    output, _ = cudnn.lstm(rnn, other, x, None)
    twin = nn.LSTM(5, 7, batch_first=True)
    twin.load_state_dict(rnn.state_dict() | {"weight_hh_l0": other})
    torch.testing.assert_close(output, twin(x)[0])
    assert float(rnn.weight_hh_l0.detach().abs().max()) > 0  # its own is as it was


def test_weights_lie_in_one_piece_and_get_their_gradients() -> None:
    tensors = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)]
    piece = cudnn._InOnePiece.apply(torch.float32, *tensors)
    assert piece.dtype == torch.float32
    torch.testing.assert_close(piece, torch.cat([tensors[0].reshape(-1), tensors[1]]).float())
    (gradient,) = torch.autograd.grad((piece * torch.arange(10.0)).sum(), tensors[0])
    torch.testing.assert_close(gradient, torch.arange(6.0, dtype=torch.float64).view(3, 2))
