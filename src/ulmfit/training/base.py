"""What the two LightningModules share: optimiser, logging, random state in checkpoints."""

from __future__ import annotations

import random
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn

from ulmfit.config import FitConfig
from ulmfit.nn.models import LanguageModel, TextClassifier
from ulmfit.optim.groups import discriminative_rates, parameter_groups


class UlmfitModule(lightning.LightningModule):
    """AdamW over all layer groups from the start; callbacks set rates and freezing."""

    def __init__(self, model: LanguageModel | TextClassifier, config: FitConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
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

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Lightning refuses to clip for any fused optimiser under mixed precision, also where nothing is scaled.
        if gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def log_training(self, loss: Tensor, size: int) -> None:
        """Loss and the rate of each layer group that is not frozen, as often as the trainer logs."""
        self.log("train_loss", loss.detach(), on_step=True, on_epoch=True, batch_size=size)
        groups = self.trainer.optimizers[0].param_groups
        training = [g for g in groups if any(p.requires_grad for p in g["params"])]  # a frozen group has no rate
        rates = {f"lr_{g['group']}": float(g["lr"]) for g in training}
        self.log_dict(rates, on_step=True, on_epoch=False, batch_size=size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_state"] = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            # Only plain values: checkpoints are read with weights_only=True.
            "numpy": _plain(np.random.get_state()),
            "python": _plain(random.getstate()),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._random_state = checkpoint.get("random_state")

    def on_train_start(self) -> None:
        # A short training is logged more often, so that there is a curve to see.
        total = int(min(self.trainer.estimated_stepping_batches, 1 << 30))
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        self.trainer.log_every_n_steps = max(1, min(every, total // 20))  # type: ignore[attr-defined]
        # Not earlier: building the loaders and the sanity checks draw random numbers too.
        state, self._random_state = self._random_state, None
        if state is None:
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
