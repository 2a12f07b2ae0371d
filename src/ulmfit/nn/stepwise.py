"""An LSTM layer step by step, for the few steps and rows for which oneDNN lays out its weights longer than it works."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_worth_it(rnn: nn.Module, x: Tensor) -> bool:
    """Whether `lstm` reads `x` (B, T, I) faster than `rnn`: one or two texts, or pieces generated one by one."""
    return (
        isinstance(rnn, nn.LSTM)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and (x.size(1) <= 5 or (x.size(1) <= 40 and x.size(0) <= 2))
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
    )


def lstm(rnn: nn.Module, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What `rnn(x, state)` returns: outputs (B, T, H) and the state ((1, B, H), (1, B, H)); no gradients."""
    weight_ih, weight_hh = rnn.get_parameter("weight_ih_l0"), rnn.get_parameter("weight_hh_l0")
    bias = rnn.get_parameter("bias_ih_l0") + rnn.get_parameter("bias_hh_l0")
    batch, steps, size = x.size(0), x.size(1), weight_hh.size(1)
    flat = x.transpose(0, 1).reshape(steps * batch, -1)
    gates = torch.addmm(bias, flat, weight_ih.t()).view(steps, batch, 4 * size)
    h, c = (x.new_zeros(batch, size),) * 2 if state is None else (state[0][0], state[1][0])
    outputs = x.new_empty(steps, batch, size)
    for t in range(steps):
        one = batch == 1
        total = gates[t, 0].addmv_(weight_hh, h[0])[None] if one else gates[t].addmm_(h, weight_hh.t())  # (B, 4 H)
        i, f, g, o = total.chunk(4, 1)
        total[:, : 2 * size].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        c = f.mul_(c).addcmul_(i, g)
        h = torch.mul(o, torch.tanh(c), out=outputs[t])
    return outputs.transpose(0, 1), (h[None].clone(), c[None].clone())
