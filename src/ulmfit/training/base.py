"""What the two LightningModules share: optimiser, logging, random state in checkpoints."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ulmfit.config import FitConfig
from ulmfit.nn.models import LanguageModel, TextClassifier
from ulmfit.nn.synchronised import several_processes
from ulmfit.optim.groups import discriminative_rates, parameter_groups
from ulmfit.training.metrics import TokenLoss
from ulmfit.training.processes import from_all


class Shares(NamedTuple):
    """What this process's batch is among the batches of all processes.

    Attributes:
        mean: of the loss over all processes.
        factors: for each count, by what this process's mean over it is to be multiplied. If the loss of any process is
            not a finite number, the first factor is not either, in all of them: so they stop together.
        totals: each count over all processes.
    """

    mean: Tensor
    factors: list[float | Tensor]
    totals: list[float | Tensor]


class UlmfitModule(lightning.LightningModule):
    """AdamW over all layer groups from the start; callbacks set rates and freezing."""

    def __init__(self, model: LanguageModel | TextClassifier, config: FitConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.train_loss = TokenLoss()  # of this epoch, per token or document
        self.latest_loss: Tensor | None = None  # of the latest step, over all processes
        self.resumed_loss: float | None = None  # the same where a checkpoint left off
        self._resumed_sums: tuple[float, int] | None = None
        self._random_state: dict[str, Any] | None = None

    def layer_groups(self) -> list[nn.Module]:
        """The network's layer groups, lowest first."""
        return self.model.layer_groups()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        groups = self.layer_groups()
        rates = discriminative_rates(optim.lr, len(groups), self.config.method.discriminative)
        beta1, beta2 = optim.betas
        # With float16 a fused optimiser would undo the loss scaling itself, after clipping.
        fused = self.trainer.precision != "16-mixed"
        return torch.optim.AdamW(
            parameter_groups(groups, rates, optim.weight_decay), betas=(beta1, beta2), eps=optim.eps, fused=fused
        )

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # Lightning would keep the gradients during the next forward pass. On a CPU what that allocates then lies around
        # them, and what is freed is in smaller pieces, too small for the next batch.
        if self.device.type == "cpu":
            optimizer.zero_grad()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for any fused optimiser under mixed precision, also where nothing is scaled.
        if not gradient_clip_val:
            return
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # Torch multiplies also by one, for no GPU to be waited for.
        if norm.device.type != "cpu" or not norm <= gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)

    def over_processes(self, loss: Tensor, *counts: float | Tensor) -> Shares:
        """Makes means over this process's batch parts of means over the batches of all processes.

        Gradients are averaged over the processes, each with the same weight, however much it read.

        Args:
            loss: a mean over the first of `counts`.
            counts: what means are taken over: tokens, documents, or their weights.
        """
        if not several_processes():
            return Shares(loss.detach(), [1.0] * len(counts), list(counts))
        local = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=loss.device) for n in counts])
        totals = torch.cat([loss.detach().double()[None] * local[:1], local])
        dist.all_reduce(totals)
        mean, totals = (totals[0] / totals[1]).float(), totals[1:]
        factors = torch.where(totals > 0, dist.get_world_size() * local / totals, 0.0).float()
        factors[0] = torch.where(torch.isfinite(mean), factors[0], torch.nan)
        return Shares(mean, list(factors), list(totals))

    def record_loss(self, loss: Tensor, size: float | Tensor) -> None:
        """Keep the loss of a step for the log, the progress line and the mean of the epoch, without waiting for it.

        Args:
            loss: mean over the batches of all processes.
            size: tokens or documents of all of them.
        """
        self.latest_loss = loss.detach()
        self.train_loss.update(self.latest_loss * size, size)

    def epoch_loss(self) -> float | None:
        """Mean training loss of this epoch so far, per token or document; None before its first step."""
        return float(self.train_loss.compute()) if int(self.train_loss.count) else None

    def on_train_epoch_start(self) -> None:
        self.train_loss.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # With several processes all have the same sums.
        checkpoint["train_loss"] = [float(self.train_loss.total), int(self.train_loss.count)]
        state = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            # Only plain values: checkpoints are read with weights_only=True.
            "numpy": _plain(np.random.get_state()),
            "python": _plain(random.getstate()),
        }
        checkpoint["random_state"] = from_all(state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        total, count = checkpoint.get("train_loss", (0.0, 0))
        self._resumed_sums = (total, count) if count else None
        self.resumed_loss = total / count if count else None
        states = checkpoint["random_state"]
        self._random_state = states[self.global_rank] if isinstance(states, list) else states  # one before version 0.2

    def on_train_start(self) -> None:
        if self._resumed_sums is not None:  # an epoch that starts sets them to zero again
            self.train_loss.total.fill_(self._resumed_sums[0])
            self.train_loss.count.fill_(self._resumed_sums[1])
            self._resumed_sums = None
        # Not earlier: building the loaders and the sanity checks draw random numbers too.
        state, self._random_state = self._random_state, None
        if state is None:
            if self.trainer.world_size > 1:  # dropout of its own in each process; rank 0 draws as one alone would
                torch.manual_seed(torch.initial_seed() + self.global_rank)
            return
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
