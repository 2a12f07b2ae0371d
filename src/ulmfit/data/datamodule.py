"""Lightning DataModules: loaders made after the processes are started, each rank its own share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import lightning
import torch
from torch import Tensor

from ulmfit.config import ClassifierConfig, LMConfig
from ulmfit.data.cache import TokenCache
from ulmfit.data.documents import DocumentBatch, DocumentBatches, batches_to_read
from ulmfit.data.streams import LMStream

_Batch = TypeVar("_Batch", DocumentBatch, tuple[Tensor, Tensor])


class _DataModule(lightning.LightningDataModule):
    """Hands batches to a GPU from pinned memory, so that copying them does not wait for the steps before."""

    def on_before_batch_transfer(self, batch: _Batch, dataloader_idx: int) -> _Batch:
        if self.trainer is None or self.trainer.strategy.root_device.type != "cuda":
            return batch
        pinned = (part.pin_memory() for part in batch)
        return DocumentBatch(*pinned) if isinstance(batch, DocumentBatch) else tuple(pinned)  # type: ignore[return-value]

    def transfer_batch_to_device(self, batch: _Batch, device: torch.device, dataloader_idx: int) -> _Batch:
        moved: _Batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        if isinstance(batch, DocumentBatch) and isinstance(moved, DocumentBatch):
            moved = moved._replace(lengths=batch.lengths)  # the network asks for them as numbers
        return moved


class LMDataModule(_DataModule):
    """Training and validation streams of a language model.

    `config.batch_size` is per process: W processes read what one with W times the batch size would.
    """

    def __init__(
        self, train: TokenCache, valid: TokenCache | None, config: LMConfig, direction: str, seed: int
    ) -> None:
        super().__init__()
        self.train, self.valid, self.config, self.direction, self.seed = train, valid, config, direction, seed

    def train_dataloader(self) -> LMStream:
        config = self.config
        rank, world = _place(self)
        return LMStream(
            self.train,
            max(world, fitting_batch_size(self.train, config.batch_size * world, config.bptt)),
            config.bptt,
            config.random_bptt,
            self.direction,
            shuffle=True,
            seed=self.seed,
            rank=rank,
            world_size=world,
        )

    def val_dataloader(self) -> LMStream | list[LMStream]:
        if self.valid is None:
            return []
        rank, world = _place(self)
        rows = fitting_batch_size(self.valid, self.config.batch_size * world)
        return LMStream(self.valid, rows, self.config.bptt, direction=self.direction, rank=rank, world_size=world)


class ClassifierDataModule(_DataModule):
    """Length-bucketed documents with labels.

    `train` may be a function of the epoch: its documents are then made anew for each epoch (subword sampling).
    """

    def __init__(
        self,
        train: TokenCache | Callable[[int], TokenCache],
        train_labels: Sequence[int],
        valid: TokenCache | None,
        valid_labels: Sequence[int] | None,
        config: ClassifierConfig,
        direction: str,
        seed: int,
    ) -> None:
        super().__init__()
        self.train, self.train_labels = train, train_labels
        self.valid, self.valid_labels = valid, valid_labels
        self.config, self.direction, self.seed = config, direction, seed

    def train_dataloader(self) -> DocumentBatches:
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        documents = self.train if isinstance(self.train, TokenCache) else self.train(epoch)
        config = self.config
        rank, world = _place(self)
        return DocumentBatches(
            documents,
            self.train_labels,
            batch_size=config.batch_size,
            tokens_per_batch=config.tokens_per_batch,
            shuffle=True,
            seed=self.seed,
            direction=self.direction,
            rank=rank,
            world_size=world,
        )

    def val_dataloader(self) -> DocumentBatches | list[DocumentBatches]:
        if self.valid is None or self.valid_labels is None:
            return []
        rank, world = _place(self)
        return batches_to_read(
            self.valid, self.valid_labels, self.direction, self.config.bptt, rank=rank, world_size=world
        )


def fitting_batch_size(cache: TokenCache, batch_size: int, bptt: int | None = None) -> int:
    """Fewer rows for a small text.

    Each row gets at least 32 tokens. With `bptt`, for training, an epoch also gets at least 32 steps as long as 8 rows
    are left: few large steps adapt a model worse than many small ones.
    """
    tokens = len(cache.tokens) - 1
    rows = min(batch_size, tokens // 32)
    if bptt is not None:
        rows = min(rows, max(8, tokens // (32 * bptt)))
    return max(1, rows)


def _place(module: lightning.LightningDataModule) -> tuple[int, int]:
    trainer = module.trainer
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
