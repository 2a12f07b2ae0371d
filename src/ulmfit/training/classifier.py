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

    def training_step(self, batch: DocumentBatch, batch_idx: int) -> Tensor:
        config = self.config
        out = self.model.classify(batch.tokens, batch.lengths, config.ar_alpha, config.tar_beta)
        loss = F.cross_entropy(
            out.logits,
            batch.labels,
            weight=None if self.weights is None else self.weights.to(out.logits.device, out.logits.dtype),
            label_smoothing=config.label_smoothing,
        )
        self.log_training(loss, len(batch.labels))
        return loss + out.penalty

    def validation_step(self, batch: DocumentBatch, batch_idx: int) -> None:
        logits = self.model(batch.tokens, batch.lengths).float()
        self.valid_loss.update(F.cross_entropy(logits, batch.labels, reduction="sum"), len(batch.labels))
        self.valid_metrics.update(logits, batch.labels)
        self.log("valid_loss", self.valid_loss, on_epoch=True, batch_size=len(batch.labels))
        self.log_dict(self.valid_metrics, on_epoch=True, batch_size=len(batch.labels))
