"""Weights out of fastai's checkpoints, by name and shape, without running anything in them.

They come as `learn.save` or `learn.save_encoder` of fastai 2 and 1 write them, or as the state dictionaries of 0.7
(`fwd_wt103.h5`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ulmfit.errors import BundleError
from ulmfit.nn.awd_lstm import AWDLSTM, Architecture
from ulmfit.nn.heads import ClassifierHead
from ulmfit.pickled_data import refuse_expansion

# Nothing in an encoder's file, "0." in a language model, "0.module." in a classifier.
_IN_MODEL = r"(?:0\.)?(?:module\.)?"
_LAYER = "(0|[1-9][0-9]?)"
_ENCODER_NAMES = [  # fastai's name -> ours
    (rf"{_IN_MODEL}(?:encoder|encoder_dp\.emb|encoder_with_dropout\.embed)\.weight", "embedding.weight"),
    (r"1\.decoder\.weight", "embedding.weight"),  # tied
    (rf"{_IN_MODEL}rnns\.{_LAYER}\.(?:module\.)?weight_hh_l0_raw", r"rnns.\1.weight_hh_l0"),
    (rf"{_IN_MODEL}rnns\.{_LAYER}\.(?:module\.)?(weight_ih_l0|bias_ih_l0|bias_hh_l0)", r"rnns.\1.\2"),
]
# Beside the raw matrix this is fastai 1's copy of it after weight dropout, so it may differ. Alone it is the matrix.
_RECURRENT_COPY = rf"{_IN_MODEL}rnns\.{_LAYER}\.(?:module\.)?weight_hh_l0"
_HEAD_NAME = re.compile(
    r"1\.layers\.([0-9]{1,3})\.(?:([0-9]{1,3}|bn|lin)\.)?(weight|bias|running_mean|running_var|num_batches_tracked)"
)
_OTHER_NETWORKS = [
    (r"_reverse$|_bwd\.", "a bidirectional LSTM"),
    (r"(^|\.)linear\.|rnns\.[0-9]{1,3}\.layers\.", "a QRNN"),
]
_SAVE = "save weights in fastai with learn.save or learn.save_encoder"

_LINEARS = ("linears.0.weight", "linears.1.weight")
_Found = dict[str, tuple[str, Tensor]]  # our name -> name in the file, tensor


@dataclass(frozen=True)
class FastaiWeights:
    """Weights of a fastai model under our names, float32.

    Attributes:
        encoder: for `AWDLSTM`.
        decoder_bias: (V,); None in files without one.
        head: for `ClassifierHead`; None in files that are no classifier.
    """

    architecture: Architecture
    encoder: dict[str, Tensor]
    decoder_bias: Tensor | None = None
    head: dict[str, Tensor] | None = None


def read_fastai_checkpoint(path: Path | str) -> FastaiWeights:
    """Read a language model, an encoder or a classifier saved by fastai 2, 1 or 0.7.

    Raises:
        BundleError: if the file holds more than weights, or weights of another kind of network; names the weight.
    """
    path = Path(path)
    found: _Found = {}
    copies: _Found = {}
    head: dict[tuple[int, str], _Found] = {}
    bias: Tensor | None = None
    for name, tensor in _load(path).items():
        if match := re.fullmatch(_RECURRENT_COPY, name):
            copies[f"rnns.{match[1]}.weight_hh_l0"] = name, tensor
        elif match := _HEAD_NAME.fullmatch(name):
            head.setdefault((int(match[1]), match[2] or ""), {})[match[3]] = name, tensor
        elif name == "1.decoder.bias":
            bias = tensor
        else:
            ours = _our_name(path, name)
            first, same = found.setdefault(ours, (name, tensor))
            _check_shape(path, name, tensor, tuple(same.shape))
            if not torch.equal(same, tensor):
                raise BundleError(
                    f"{path}: '{name}' and '{first}' differ, expected one matrix under both names (tied weights); "
                    "save the encoder alone with learn.save_encoder"
                )
    for ours, copy in copies.items():
        _check_shape(path, *copy, tuple(found.setdefault(ours, copy)[1].shape))
    architecture = _architecture(path, found)
    with torch.device("meta"):
        encoder = _matched(path, found, AWDLSTM(architecture))
    if bias is not None:
        _check_shape(path, "1.decoder.bias", bias, (architecture.vocab_size,))
    return FastaiWeights(architecture, encoder, bias, _head(path, head, architecture) if head else None)


class _Ignored:
    """Stands for an object of the optimiser's state, which is not read."""

    def __new__(cls, *_: object) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


def _stand_in(module: str, name: str) -> type[_Ignored]:
    return type(name, (_Ignored,), {"__module__": module})


# What `learn.save` writes besides tensors: the learning rates. These names stand for our empty classes while a file is
# read, so that neither fastai's nor numpy's are called.
_IN_OPTIMISERS: list[Any] = [
    _stand_in("fastcore.foundation", "L"),
    _stand_in("numpy", "dtype"),
    _stand_in("numpy.core.multiarray", "scalar"),
    _stand_in("numpy._core.multiarray", "scalar"),
]


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, as float32."""
    if not path.is_file():
        raise BundleError(f"no file {path}, expected a fastai checkpoint; {_SAVE}")
    try:
        refuse_expansion(path)
        with torch.serialization.safe_globals(_IN_OPTIMISERS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for files that are not its own
        objects = re.search(r"GLOBAL (\S+)", str(error))
        if objects:
            raise BundleError(
                f"{path} holds a Python object ('{objects[1]:.80}') as files of learn.export do, and loading such "
                f"executes code, expected weights alone; {_SAVE}"
            ) from error
        raise BundleError(f"{path} is not a torch checkpoint, or holds more than weights; {_SAVE}") from error
    if isinstance(state, Mapping) and isinstance(state.get("model"), Mapping):
        state = state["model"]
    if not isinstance(state, Mapping) or not state:
        raise BundleError(f"{path} holds a {type(state).__name__}, expected weights by name; {_SAVE}")
    return {str(name): _number(path, str(name), value) for name, value in state.items()}


def _number(path: Path, name: str, value: object) -> Tensor:
    """`value` as float32 (a counter as it is), if it is an ordinary tensor that its file really holds."""
    ordinary = isinstance(value, Tensor) and not value.is_nested and value.layout is torch.strided
    if not isinstance(value, Tensor) or not ordinary or value.is_quantized or value.device.type != "cpu":
        raise BundleError(f"{path}: '{name:.80}' is not an ordinary tensor; {_SAVE}")
    counter = name.endswith("num_batches_tracked") and value.dtype == torch.int64
    held = value.untyped_storage().nbytes() >= value.numel() * value.element_size() > 0
    if not held or not (counter or value.is_floating_point()):
        raise BundleError(
            f"{path}: '{name:.80}' has {value.dtype} numbers in shape {tuple(value.shape)} and "
            f"{value.untyped_storage().nbytes()} bytes of them, expected floating-point weights; {_SAVE}"
        )
    number = value.detach() if counter else value.detach().float()
    if not bool(torch.isfinite(number).all()):
        raise BundleError(f"{path}: '{name:.80}' holds infinite numbers or NaN, expected finite ones; save it again")
    return number


def _our_name(path: Path, name: str) -> str:
    for pattern, ours in _ENCODER_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    for pattern, network in _OTHER_NETWORKS:
        if re.search(pattern, name):
            raise BundleError(f"{path} is {network} (it has '{name:.80}'), expected a one-directional AWD_LSTM")
    raise BundleError(f"{path} has an unknown weight '{name:.80}', expected the names of fastai's AWD_LSTM; {_SAVE}")


def _architecture(path: Path, found: _Found) -> Architecture:
    for name in ("embedding.weight", "rnns.0.weight_hh_l0"):
        if name not in found:
            raise BundleError(f"{path} lacks '{name}', expected an AWD_LSTM; {_SAVE}")
        if found[name][1].dim() != 2:
            _check_shape(path, *found[name], ("rows", "columns"))
    vocabulary, width = found["embedding.weight"][1].shape
    layers = len({name.split(".")[1] for name in found if name.startswith("rnns.")})
    hidden = found["rnns.0.weight_hh_l0"][1].shape[1] if layers > 1 else width
    return Architecture(vocabulary, width, hidden, layers)


def _matched(path: Path, found: _Found, module: nn.Module) -> dict[str, Tensor]:
    """The tensors, if they are exactly those of `module`."""
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name, shape in expected.items():
        if name not in found:
            raise BundleError(f"{path} lacks '{name}' of shape {shape}, expected all weights of the network; {_SAVE}")
        _check_shape(path, *found[name], shape)
    for name in sorted(found.keys() - expected.keys()):
        raise BundleError(f"{path} has an unknown weight '{found[name][0]}', expected {len(expected)} others; {_SAVE}")
    return {name: found[name][1] for name in expected}


def _check_shape(path: Path, name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    if tuple(tensor.shape) != expected:
        shape = f"({', '.join(map(str, expected))}{',' if len(expected) == 1 else ''})"
        raise BundleError(
            f"{path}: '{name}' has shape {tuple(tensor.shape)}, expected {shape} beside the other weights; {_SAVE}"
        )


def _head(path: Path, modules: dict[tuple[int, str], _Found], architecture: Architecture) -> dict[str, Tensor]:
    """The head's tensors under our names. How fastai numbers its layers differs by version; their order does not."""
    blocks = [modules[key] for key in sorted(modules)]
    if ["running_mean" in block for block in blocks] != [True, False, True, False]:
        kinds = ", ".join("batch norm" if "running_mean" in block else "linear" for block in blocks)
        raise BundleError(
            f"the head in {path} is {kinds}, expected batch norm, linear, batch norm, linear; "
            "save the encoder alone with learn.save_encoder"
        )
    found: _Found = {}
    for i, block in enumerate(blocks):
        ours = f"{'linears' if i % 2 else 'norms'}.{i // 2}"
        if i % 2 == 0:
            block.setdefault("num_batches_tracked", ("", torch.tensor(0)))  # unknown to torch 0.3
        found |= {f"{ours}.{name}": value for name, value in block.items()}
    biases = [found.pop(f"linears.{i}.bias", None) for i in range(2)]
    hidden, classes = (found[name][1].size(0) if name in found and found[name][1].dim() else 1 for name in _LINEARS)
    with torch.device("meta"):
        tensors = _matched(path, found, ClassifierHead(3 * architecture.embedding_dim, hidden, classes))
    for i, (bias, size) in enumerate(zip(biases, (hidden, classes), strict=True)):
        if bias is not None:
            _check_shape(path, *bias, (size,))
            tensors[f"norms.{i}.bias"] = _moved_before(path, bias, tensors[_LINEARS[i]], tensors[f"norms.{i}.bias"])
    return tensors


def _moved_before(path: Path, bias: tuple[str, Tensor], matrix: Tensor, before: Tensor) -> Tensor:
    """The batch norm's bias with which `matrix` needs none: fastai 1 and 0.7 have both, our layers only the first.

    A wide matrix reaches every bias: W (x + d) = W x + b for d = W^+ b, so the outputs stay the same.
    """
    target = bias[1].double()
    shift: Tensor = torch.linalg.pinv(matrix.double()) @ target
    if not torch.allclose(matrix.double() @ shift, target, atol=1e-6):
        raise BundleError(
            f"{path}: '{bias[0]}' cannot be expressed by a linear layer without bias, which is expected; "
            "save the encoder alone with learn.save_encoder"
        )
    return (before.double() + shift).float()
