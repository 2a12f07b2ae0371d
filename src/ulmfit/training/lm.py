"""The language model's LightningModule: pre-training and target-task fine-tuning are the same loop."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from ulmfit.config import LMConfig
from ulmfit.nn.awd_lstm import State, detach
from ulmfit.nn.models import LanguageModel, LMLoss
from ulmfit.training.base import UlmfitModule
from ulmfit.training.metrics import TokenLoss, TokenPerplexity
from ulmfit.training.processes import from_all


class LMModule(UlmfitModule):
    """Truncated back-propagation through time over `LMStream` batches, the hidden state carried from batch to batch.

    Training and validation keep separate states, as plain attributes: a buffer would be overwritten under DDP.
    """

    def __init__(self, model: LanguageModel, config: LMConfig) -> None:
        super().__init__(model, config)
        self.model: LanguageModel = model
        self.config: LMConfig = config
        model.encoder.dropout = config.dropout
        self.valid_loss = TokenLoss()
        self.valid_perplexity = TokenPerplexity()
        self._train_state: State | None = None
        self._valid_state: State | None = None
        self._resumed_state: State | None = None
        self.loss_of: Callable[[Tensor, Tensor, State | None], LMLoss] = self.loss  # or the same, but faster

    def on_train_start(self) -> None:
        super().on_train_start()
        # Resumed in the middle of an epoch; Lightning then calls no epoch start.
        self._train_state, self._resumed_state = self._resumed_state, None

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._train_state = None  # new streams start at zeros

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        tokens, targets = batch
        out = self.loss_of(tokens, targets, self._train_state)
        self._train_state = detach(out.state)
        shares = self.over_processes(out.cross_entropy, tokens.numel())
        self.record_loss(shares.mean, shares.totals[0])
        return (out.cross_entropy + out.penalty) * shares.factors[0]

    def loss(self, tokens: Tensor, targets: Tensor, state: State | None) -> LMLoss:
        """Loss of a batch after `state`, as configured."""
        config = self.config
        return self.model.loss(tokens, targets, state, config.ar_alpha, config.tar_beta, config.tokens_per_chunk)

    def settings(self) -> Hashable:
        """What `loss` depends on besides its arguments and the weights."""
        rates = [self.model.encoder.rate(kind) for kind in ("input", "hidden", "output", "embedding", "weight")]
        return (*rates, *(parameter.requires_grad for parameter in self.parameters()))

    def on_validation_epoch_start(self) -> None:
        self._valid_state = None

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        tokens, targets = batch
        if len(tokens) > 0:  # with little text there are ranks without a row
            total, state = self.model.total_nll(tokens, targets, self._valid_state, self.config.tokens_per_chunk)
            self._valid_state = detach(state)
            self.valid_loss.update(total, targets.numel())
            self.valid_perplexity.update(total, targets.numel())
        self.log("valid_loss", self.valid_loss, on_epoch=True)
        self.log("valid_perplexity", self.valid_perplexity, on_epoch=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        state = self._train_state
        checkpoint["hidden_state"] = from_all(None if state is None else [(h.cpu(), c.cpu()) for h, c in state])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["hidden_state"]
        if state and not isinstance(state[0], tuple):  # that of each rank; before version 0.2 there was one
            state = state[self.global_rank]
        if state is not None:
            self._resumed_state = [(h.to(self.device), c.to(self.device)) for h, c in state]
