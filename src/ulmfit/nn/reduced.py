"""Networks at work with fewer bits: bfloat16 or int8 weights, made when a bundle is loaded and never saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ulmfit.config import TOKENS_AT_A_TIME
from ulmfit.errors import UsageError, did_you_mean
from ulmfit.nn import compiled_lstm
from ulmfit.nn.awd_lstm import AWDLSTM
from ulmfit.nn.compiled_lstm import CompiledPartsLSTM, CompiledTwoPartsLSTM
from ulmfit.nn.matrix_tiles import kind_of_floats
from ulmfit.nn.packed import PackedLSTM, pack_weights
from ulmfit.nn.processor import cpu_has_tiles, cpu_multiplies_bfloat16, cpu_multiplies_int8
from ulmfit.nn.vectors import LEAST_SIZE_TO_COMPILE

PRECISIONS = ("32", "auto", "bf16", "int8")
# Up to so many rows FBGEMM multiplies int8 faster than oneDNN, with tiles and without.
_FEW_ROWS_WITH_TILES, _FEW_ROWS = 4, 32
_WORTH_COMPILING = 10_000  # tokens: half a second of work on two cores, for weights that are laid out in a tenth


def reduce_precision(encoder: AWDLSTM, precision: str) -> None:
    """Let `encoder`, in place and for good, work with `precision`; it cannot be trained then.

    Args:
        precision: "32" leaves it as it is; "bf16" has weights and hidden states in bfloat16, cells and sums inside
            products in float32; "int8" has the LSTMs' weights in 8 bits, a scale for each row, and what they are
            multiplied with rounded to 8 bits of the largest value in the batch or, in compiled loops, of each text;
            "auto" is "bf16" where the hardware multiplies it natively, else "32".

    Raises:
        UsageError: a precision that is not one of these, or not on this machine.
    """
    device = encoder.embedding.weight.device
    if precision not in PRECISIONS:
        raise UsageError(
            f"precision is '{precision}', expected one of {', '.join(PRECISIONS)}{did_you_mean(precision, PRECISIONS)}"
        )
    on_gpu = device.type == "cuda"
    native = torch.cuda.is_bf16_supported(False) if on_gpu else device.type == "cpu" and cpu_multiplies_bfloat16()
    if precision == "bf16" and not native:
        raise UsageError(
            "precision=bf16 was asked for, but this machine has no bfloat16 units; use precision=int8 or 32"
        )
    compiled = device.type == "cpu" and encoder.architecture.hidden_dim >= LEAST_SIZE_TO_COMPILE
    if precision == "bf16" or (precision == "auto" and native):
        if compiled and compiled_lstm.is_available("bf16"):
            _replace(encoder, compiled_lstm.CompiledBFloat16LSTM)
        encoder.to(torch.bfloat16)
    elif precision == "int8":
        if device.type != "cpu":
            raise UsageError(f"precision=int8 works on the CPU, not on {device}; use precision=bf16 or 32 there")
        _replace(
            encoder,
            compiled_lstm.CompiledInt8LSTM if compiled and compiled_lstm.is_available("int8") else Int8LSTM,
        )
    pack_weights(encoder)


def compile_for(encoder: AWDLSTM, tokens: int) -> None:
    """Let `encoder`, whose weights stay from now on, read batches of documents in tiles, if `tokens` are enough.

    That is for float32, in parts (`kinds`), on processors that have tiles. Single documents are read as before: as fast
    as weights come from memory, and in parts these are longer (6 bytes or 4 each, beside the others).
    """
    kind, weight = kind_of_floats(), encoder.embedding.weight
    apt = (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and encoder.architecture.hidden_dim >= LEAST_SIZE_TO_COMPILE
        and all(isinstance(rnn, PackedLSTM) for rnn in encoder.rnns)
    )
    if encoder.twins and encoder.twins[0].kind != kind:
        encoder.twins = ()  # made when torch was content with another precision
    if encoder.twins or tokens < _WORTH_COMPILING or not apt or kind == "fp32":
        return
    if compiled_lstm.is_available(kind):
        layer = CompiledPartsLSTM if kind == "bf16x6" else CompiledTwoPartsLSTM
        encoder.twins = tuple(layer(rnn.rnn) for rnn in encoder.rnns if isinstance(rnn, PackedLSTM))


def _replace(encoder: AWDLSTM, layer: Callable[[nn.LSTM], nn.Module]) -> None:
    encoder.rnns = nn.ModuleList(layer(rnn) for rnn in encoder.rnns if isinstance(rnn, nn.LSTM))


def tokens_at_a_time(encoder: AWDLSTM) -> int:
    """How many tokens a network at work reads at once, unless asked otherwise.

    Twice as many in bfloat16, whose numbers are half as long; half as many in int8, for torch holds its gates in
    float32: 2,240 tokens are read no slower, short texts 1.15 times as fast, and with less memory.
    """
    if isinstance(encoder.rnns[0], Int8LSTM | compiled_lstm.CompiledInt8LSTM):
        return TOKENS_AT_A_TIME // 2
    return TOKENS_AT_A_TIME * 4 // encoder.embedding.weight.element_size()


class Int8LSTM(nn.Module):
    """An LSTM layer in eval mode with 8-bit weights, one scale for each row; `forward` is that of `nn.LSTM`.

    Raises:
        UsageError: a build of torch without kernels for it.
    """

    def __init__(self, rnn: nn.LSTM) -> None:
        super().__init__()
        self.hidden_size = rnn.hidden_size
        engines = torch.backends.quantized.supported_engines
        usual = torch.backends.quantized.engine
        # oneDNN multiplies many rows twice as fast with AMX, and 1.1 to 1.2 times without.
        many = "onednn" if "onednn" in engines and (cpu_has_tiles() or cpu_multiplies_int8()) else usual
        self._few_rows = _FEW_ROWS_WITH_TILES if cpu_has_tiles() else _FEW_ROWS
        try:
            self._few = _packed(rnn, usual)
            self._many = self._few if many == usual else _packed(rnn, many)
        except (AttributeError, NotImplementedError, RuntimeError) as error:
            raise UsageError(
                "precision=int8 was asked for, but this build of torch has no int8 LSTM for this processor; "
                "use precision=32"
            ) from error
        finally:
            torch.backends.quantized.engine = usual

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(B, T, I) -> outputs (B, T, H) and the state ((1, B, H), (1, B, H))."""
        if state is None:
            zeros = x.new_zeros(1, x.size(0), self.hidden_size)
            state = (zeros, zeros)
        cell = self._few if x.size(0) <= self._few_rows else self._many
        output, h, c = torch.quantized_lstm(
            x, state, [cell], True, 1, 0.0, False, False, True, dtype=torch.qint8, use_dynamic=True
        )
        return output, (h, c)


def _packed(rnn: nn.LSTM, engine: str) -> torch.ScriptObject:
    """The layer's weights as `engine` multiplies them."""
    torch.backends.quantized.engine = engine
    biases = [rnn.get_parameter(name).detach() for name in ("bias_ih_l0", "bias_hh_l0")]
    weights = [rnn.get_parameter(name).detach() for name in ("weight_ih_l0", "weight_hh_l0")]
    products = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*deprecated.*")
        for weight, bias in zip(weights, biases, strict=True):
            scales = weight.abs().amax(1).clamp(min=1e-12).double() / 127  # (4 H,)
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
            products.append(torch.ops.quantized.linear_prepack(quantized, bias))
    spare_bit = engine in ("x86", "fbgemm") and not cpu_multiplies_int8()  # their sums would overflow 16 bits
    cell: torch.ScriptObject = torch.ops.quantized.make_quantized_cell_params_dynamic(*products, *biases, spare_bit)
    return cell
