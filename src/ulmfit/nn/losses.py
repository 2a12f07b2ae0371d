"""Softmax cross-entropy in chunks, and the activation penalties AR and TAR."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulmfit.nn import fused_cross_entropy, fused_layer

_LEAST_TO_COMPILE = 1 << 20  # entries of a matrix: with fewer, hardly any work takes as long as Numba takes
_softmax_out = torch.ops.aten._softmax.out
_log_softmax_out = torch.ops.aten._log_softmax.out


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass, so that no (N, V) matrix ever exists.

    The bias is a row of the matrix, against a column of ones in the hidden states: its sum and its gradient are part
    of the products. (Two rows, the second the rounding error of the first, and zeros for alignment on a GPU.)
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int | None, dtype: torch.dtype
    ) -> Tensor:
        kind = _kind_for(hidden, weight, dtype)
        if kind:
            of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
            found = fused_cross_entropy.cross_entropy(
                kind, hidden, weight, bias, targets, of_hidden, of_weight, of_bias, chunk or fused_cross_entropy.CHUNK
            )
            ctx.save_for_backward(found.grad_hidden, found.grad_weight, found.grad_bias)
            ctx.rows = hidden.size(0)
            loss: Tensor = (found.total / ctx.rows).float()
            return loss
        chunk = _rows_at_a_time(chunk, hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):  # which on a GPU has softmax in float32
            return _ChunkedCrossEntropy._forward(ctx, hidden, weight, bias, targets, chunk, dtype)

    @staticmethod
    def _forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int, dtype: torch.dtype
    ) -> Tensor:
        n, size = hidden.shape
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        device = hidden.device
        h = _with_ones(hidden, dtype)  # (N, E + 2)
        on_cpu = device.type == "cpu"
        w = weight.to(dtype) if on_cpu else weight  # (V, E)
        matrix = _with_bias(w, bias, dtype)  # (E + 2, V)
        w = w if on_cpu else matrix.t()[:, :size]
        total = torch.zeros((), dtype=torch.float64 if on_cpu else torch.float32, device=device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # oneDNN multiplies a transposed bfloat16 matrix at half the speed, so it is the narrow one that is transposed.
        across = dtype != weight.dtype and on_cpu
        first = 0 if need_weight else size  # a frozen matrix costs no gradient, only the bias does
        shape = (h.size(1) - first, w.size(0)) if across else (w.size(0), h.size(1) - first)
        grad_matrix = torch.zeros(shape, dtype=weight.dtype, device=device) if need_weight or need_bias else None
        product = torch.empty(shape, dtype=dtype) if across and grad_matrix is not None else None  # of one chunk
        buffer = torch.empty(min(chunk, n), w.size(0), dtype=dtype, device=device)
        for start in range(0, n, chunk):
            rows = h[start : start + chunk]  # (C, E + 2)
            target = targets[start : start + chunk]  # (C,)
            logits = torch.mm(rows, matrix, out=buffer[: rows.size(0)])  # (C, V)
            nll, grad = _probabilities(logits, target)  # (C,), (C, V)
            total += nll.sum(dtype=total.dtype)
            if grad_hidden is None and grad_matrix is None:
                continue
            # d loss / d logits = (softmax - one-hot) / N; the division waits for the backward pass, where a gradient
            # scaler's factor makes up for it: float16 would underflow here.
            grad[torch.arange(grad.size(0), device=device), target] -= 1
            if grad_hidden is not None and on_cpu and grad_hidden.dtype == dtype:
                torch.mm(grad, w, out=grad_hidden[start : start + chunk])
            elif grad_hidden is not None:
                grad_hidden[start : start + chunk] = torch.mm(grad, w)
            if grad_matrix is None:
                continue
            if product is not None:
                grad_matrix += torch.mm(rows[:, first:].t().contiguous(), grad, out=product)
            elif dtype != weight.dtype:
                grad_matrix += torch.mm(grad.t(), rows[:, first:])
            else:
                grad_matrix.addmm_(grad.t(), rows[:, first:])
        if grad_matrix is not None:
            grad_matrix = grad_matrix.t() if across else grad_matrix  # (V, E + 2), or (V, 2) for the bias alone
            grad_weight = grad_matrix[:, :size] if need_weight else None
            grad_bias = grad_matrix[:, size - first] if need_bias else None
        else:
            grad_weight = grad_bias = None
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.rows = n
        return (total / n).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0] / ctx.rows
        return (*(None if g is None else _scaled(g, scale) for g in ctx.saved_tensors), None, None, None)


def _kind_for(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> str | None:
    """The kind of compiled loops that are faster than torch's operations here, if there are such."""
    if weight.numel() < _LEAST_TO_COMPILE or weight.dtype != torch.float32 or hidden.size(0) == 0:
        return None
    floats = dtype == hidden.dtype == torch.float32
    kind = fused_layer.kind_on(hidden.device, dtype == torch.bfloat16, floats, hidden.size(0))
    return kind if kind and fused_cross_entropy.is_available(kind) else None


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    """A contiguous copy of `x`, multiplied in float32."""
    if x.device.type == "cpu" and x.dtype == torch.float32:  # a product that is then transposed would be another copy
        return x.clone(memory_format=torch.contiguous_format).mul_(scale)
    return (x.float() * scale).to(x.dtype).contiguous()


def _extra(device: torch.device) -> int:
    return 2 if device.type == "cpu" else 8  # tensor cores want multiples of 8


def _with_ones(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, E) -> (N, E + 2 or more), the last columns ones; rows aligned to 64 bytes."""
    n, size = hidden.shape
    width = size + _extra(hidden.device)
    padded = hidden.new_ones(n, (width + 31) // 32 * 32, dtype=dtype)
    padded[:, :size] = hidden
    return padded[:, :width]


def _with_bias(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(V, E), (V,) -> (E + 2 or more, V); the last rows add up to the bias."""
    size, width = weight.size(1), weight.size(1) + _extra(weight.device)
    if weight.device.type == "cpu":
        matrix = weight.new_zeros(width, weight.size(0), dtype=dtype)
    else:  # a GPU multiplies a transposed matrix as fast, and is spared the copy across
        matrix = weight.new_zeros(weight.size(0), width, dtype=dtype).t()
    matrix[:size] = weight.to(dtype).t()
    matrix[size] = bias
    matrix[size + 1] = bias - matrix[size]
    return matrix


def _probabilities(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (C,) of `target` and softmax of `logits` (C, V), written over them on the CPU."""
    if logits.dtype == torch.bfloat16:
        # One pass. A token's loss is off by 2**-9 at most; its gradient would be rounded to this anyway.
        if logits.device.type == "cpu":
            _softmax_out(logits, 1, False, out=logits)
        else:
            logits = logits.softmax(1)
        return logits.gather(1, target[:, None])[:, 0].float().clamp(min=1e-38).log().neg(), logits
    nll, log_probabilities = _log_softmax(logits.float(), target)
    return nll, log_probabilities.exp_().to(logits.dtype)


def _log_softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood (C,) of `target` and log-softmax of `logits` (C, V), written over them on the CPU."""
    if logits.device.type == "cpu":
        _log_softmax_out(logits, 1, False, out=logits)  # row by row, so in place is safe
    else:
        logits = logits.log_softmax(1)
    return -logits.gather(1, target[:, None])[:, 0], logits


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Mean cross-entropy of `softmax(hidden @ weight.T + bias)` in nats, without holding all logits.

    Args:
        hidden: (N, E). weight: (V, E). bias: (V,). targets: (N,) int64.
        chunk: rows whose logits exist at a time; None: 320 in compiled loops, 1,024 on other CPUs, 8,192 on a GPU,
            which they keep busy.
        dtype: of the matrix products; None: autocast's where it is on, else `hidden`'s.
    """
    device = hidden.device.type
    if dtype is None:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, chunk, dtype)  # type: ignore[no-untyped-call]
    return loss


def _rows_at_a_time(chunk: int | None, device: torch.device) -> int:
    return chunk or (1024 if device.type == "cpu" else 8192)


@torch.no_grad()
def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, chunk: int | None = None
) -> Tensor:
    """Sum of the cross-entropies in float64, for exact perplexities; no gradients."""
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    chunk = _rows_at_a_time(chunk, hidden.device)
    for start in range(0, hidden.size(0), chunk):
        logits = F.linear(hidden[start : start + chunk], weight).float().add_(bias)
        nll, _ = _log_softmax(logits, targets[start : start + chunk])
        total += nll.sum(dtype=torch.float64).cpu()
    return total


def activation_regularisation(
    dropped: Tensor, raw: Tensor, alpha: float, beta: float, mask: Tensor | None = None
) -> Tensor:
    """AR and TAR (Merity et al. 2017, section 4.6): alpha * mean(dropped^2) + beta * mean((raw[t+1] - raw[t])^2).

    Args:
        dropped, raw: last layer's outputs after and before output dropout, (B, T, E); computed in float32.
        mask: (B, T) bool, True where there is a token; None: everywhere.
    """
    penalty = torch.zeros((), device=raw.device)
    if alpha > 0:
        squares = dropped.float().pow(2)
        penalty = penalty + alpha * _mean(squares, mask)
    if beta > 0 and raw.size(1) > 1:
        steps = (raw[:, 1:].float() - raw[:, :-1].float()).pow(2)
        penalty = penalty + beta * _mean(steps, None if mask is None else mask[:, 1:] & mask[:, :-1])
    return penalty


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return x.mean()
    return (x * mask.unsqueeze(-1)).sum() / (mask.sum().clamp(min=1) * x.size(-1))
