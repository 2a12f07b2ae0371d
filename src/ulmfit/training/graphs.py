"""A language model's steps as CUDA graphs: a thousand small kernels that start together instead of one by one."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from ulmfit.nn.awd_lstm import State
from ulmfit.nn.models import LMLoss
from ulmfit.training.lm import LMModule

log = logging.getLogger("ulmfit")

_WARM = 3  # steps of a shape before its graph is made: a rare one is not worth it, and kernels have been chosen by then
_MOST = 64  # graphs, each of some megabytes: random windows have 40 common lengths


class CudaGraphs(lightning.Callback):
    """Lets a language model train by graphs where that is possible: one process, one NVIDIA GPU, no float16.

    Forward pass, backward pass and gradients of a batch's shape are recorded once and replayed; clipping and optimiser
    stay as they are. The results are those of the same kernels started one by one, but for the random numbers drawn.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if (
            isinstance(pl_module, LMModule)
            and pl_module.device.type == "cuda"
            and torch.version.cuda is not None
            and trainer.world_size == 1
            and trainer.accumulate_grad_batches == 1  # gradients are handed over, not added
            and trainer.precision != "16-mixed"  # whose losses are scaled before the backward pass
        ):
            pl_module.loss_of = StepGraphs(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if isinstance(pl_module, LMModule):
            pl_module.loss_of = pl_module.loss

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)


class StepGraphs:
    """`LMModule.loss` for batches on a GPU, with a graph for each shape that comes often.

    The state that it returns is overwritten by the next call, and so are gradients.
    """

    def __init__(self, module: LMModule) -> None:
        self._module = module
        self._works = True
        self._forget(None)

    def _forget(self, key: Hashable) -> None:
        self._key = key  # what graphs hold besides shapes
        self._seen: Counter[torch.Size] = Counter()
        self._graphs: dict[torch.Size, _Graph] = {}
        self._parameters: list[nn.Parameter] = [p for p in self._module.parameters() if p.requires_grad]
        self._gradients: list[Tensor] = []
        self._state: State = []
        self._pool: Any = None  # memory that all graphs use in turn; without them it cannot be used again

    def __call__(self, tokens: Tensor, targets: Tensor, state: State | None) -> LMLoss:
        if not self._works:
            return self._module.loss(tokens, targets, state)
        key = self._module.settings()
        if key != self._key:
            self._forget(key)
        graph = self._graphs.get(tokens.shape)
        if graph is None:
            self._seen[tokens.shape] += 1
            rare = self._seen[tokens.shape] <= _WARM or len(self._graphs) >= _MOST
            if rare or (self._state and self._state[0][0].size(1) != tokens.size(0)) or state is None:
                return self._module.loss(tokens, targets, state)
            if not self._state:
                self._gradients = [torch.empty_like(parameter) for parameter in self._parameters]
                self._state = [(torch.empty_like(h), torch.empty_like(c)) for h, c in state]
                self._pool = torch.cuda.graph_pool_handle()
            graph = _Graph(tokens, targets)
            try:
                graph.record(self._module, self._state, self._parameters, self._gradients, self._pool)
            except RuntimeError as error:  # a kernel that cannot be recorded, or too little memory
                log.warning("training goes on without CUDA graphs, as with trainer.cuda_graphs=false: %.200s", error)
                self._forget(key)
                self._works = False
                return self._module.loss(tokens, targets, state)
            self._graphs[tokens.shape] = graph
        self._take(state)
        cross_entropy, penalty = graph.replay(tokens, targets)
        handed: Tensor = _Replayed.apply(penalty, self._parameters, self._gradients, *self._parameters)  # type: ignore[no-untyped-call]
        return LMLoss(cross_entropy, handed, self._state)

    def _take(self, state: State | None) -> None:
        """Put `state` where the graphs read it."""
        if state is None:
            torch._foreach_zero_([part for pair in self._state for part in pair])
            return
        for pair, given in zip(self._state, state, strict=True):
            for part, value in zip(pair, given, strict=True):
                if part.data_ptr() != value.data_ptr():
                    part.copy_(value)


class _Graph:
    """The recorded step for one shape of batches."""

    def __init__(self, tokens: Tensor, targets: Tensor) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.tokens, self.targets = tokens.clone(), targets.clone()
        self.cross_entropy = self.penalty = torch.empty(())

    def record(
        self,
        module: LMModule,
        state: State,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        pool: Any,
    ) -> None:
        """Record loss, gradients (into `gradients`) and the new state (into `state`)."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        mixed = torch.is_autocast_enabled("cuda")
        with (
            torch.cuda.stream(stream),
            # A cast that is remembered from outside would not be in the graph.
            torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled=mixed, cache_enabled=False),
        ):
            self.graph.capture_begin(pool=pool)
            try:
                out = module.loss(self.tokens, self.targets, state)
                found = torch.autograd.grad(out.cross_entropy + out.penalty, parameters)
                torch._foreach_copy_(list(gradients), list(found))
                torch._foreach_copy_(
                    [part for pair in state for part in pair], [part.detach() for pair in out.state for part in pair]
                )
                self.cross_entropy, self.penalty = out.cross_entropy.detach(), out.penalty.detach()
            finally:
                self.graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def replay(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy and penalty of a batch."""
        self.tokens.copy_(tokens)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.cross_entropy.clone(), self.penalty


class _Replayed(torch.autograd.Function):
    """A loss whose gradients are there already: the backward pass hands them to the parameters."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], *inputs: Tensor
    ) -> Tensor:
        ctx.parameters, ctx.gradients = parameters, gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        for parameter, gradient in zip(ctx.parameters, ctx.gradients, strict=True):
            parameter.grad = gradient
        return (None, None, None, *(None for _ in ctx.parameters))
