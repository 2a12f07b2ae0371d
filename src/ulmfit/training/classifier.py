"""The classifier's LightningModule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ulmfit.config import ClassifierConfig
from ulmfit.data.documents import DocumentBatch
from ulmfit.nn.models import TextClassifier
from ulmfit.training.base import UlmfitModule
from ulmfit.training.metrics import TokenLoss, classifier_metrics


class ClassifierModule(UlmfitModule):
    """Trains a `TextClassifier` on `DocumentBatch`es.

    Args:
        class_weights: (C,) weights of the classes in the loss; None: equal.
    """

    def __init__(
        self, model: TextClassifier, config: ClassifierConfig, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(model, config)
        self.model: TextClassifier = model
        self.config: ClassifierConfig = config
        model.encoder.dropout = config.dropout
        model.head.dropout = tuple(config.head_dropout)
        model.bptt, model.max_len = config.bptt, config.max_len
        self.valid_metrics = classifier_metrics(model.classes, "valid_")
        self.valid_loss = TokenLoss()  # here: per document
        self.weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)

    def on_fit_start(self) -> None:
        self.model.head.across_processes = self.trainer.world_size > 1

    def on_fit_end(self) -> None:
        self.model.head.across_processes = False

    def training_step(self, batch: DocumentBatch, batch_idx: int) -> Tensor:
        config = self.config
        out = self.model.classify(batch.tokens, batch.lengths, config.ar_alpha, config.tar_beta)
        weights = None if self.weights is None else self.weights.to(out.logits.device, out.logits.dtype)
        loss = F.cross_entropy(out.logits, batch.labels, weight=weights, label_smoothing=config.label_smoothing)
        documents = len(batch.labels)
        weight = documents if weights is None else weights[batch.labels].sum()
        shares = self.over_processes(loss, weight, out.parts.steps, out.parts.pairs, documents)
        self.record_loss(shares.mean, shares.totals[-1])
        share, of_steps, of_pairs, _ = shares.factors
        return loss * share + (out.parts.ar * of_steps + out.parts.tar * of_pairs)

    def validation_step(self, batch: DocumentBatch, batch_idx: int) -> None:
        if len(batch.labels) > 0:  # with few documents there are ranks without any
            logits = self.model(batch.tokens, batch.lengths).float()
            self.valid_loss.update(F.cross_entropy(logits, batch.labels, reduction="sum"), len(batch.labels))
            self.valid_metrics.update(logits, batch.labels)
        self.log("valid_loss", self.valid_loss, on_epoch=True, batch_size=len(batch.labels))
        self.log_dict(self.valid_metrics, on_epoch=True, batch_size=len(batch.labels))
