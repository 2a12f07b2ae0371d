"""One way to run a training: trainer, callbacks, checkpoints, resume. Command line and learners call `fit`."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from ulmfit.config import FitConfig, LoggerConfig, TrainerConfig
from ulmfit.durations import seconds_of
from ulmfit.errors import UsageError
from ulmfit.interruption import kept_signal_handlers
from ulmfit.nn.processor import cpu_multiplies_bfloat16
from ulmfit.training.base import UlmfitModule
from ulmfit.training.callbacks import method_callbacks
from ulmfit.training.checkpoints import Recovery, Validated, WholeFiles, recovery_path
from ulmfit.training.freed import FreedMemory
from ulmfit.training.graphs import CudaGraphs
from ulmfit.training.processes import ranks_for
from ulmfit.training.progress import Progress
from ulmfit.training.stability import NonFiniteGuard
from ulmfit.training.training_log import TrainingLog

log = logging.getLogger("ulmfit")

_NOISE = (
    ".*does not have many workers.*",
    ".*The number of training batches.*is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*GPU available but not used.*",
    ".*You defined a `validation_step` but have no `val_dataloader`.*",
    ".*No positive samples.*",
    ".*is not a valid.*sampler.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*mid-epoch.*",
    ".*Total length of .* across ranks is zero.*",  # no validation
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # the loss shown is that of rank 0
)


@dataclass
class FitResult:
    """Figures of the weights kept, and how training went.

    Attributes:
        metrics: validation figures of the weights kept, and the training loss of the last epoch.
        steps: optimiser steps made, in all attempts together.
        main: whether this process is the one that writes files (rank 0).
        stopped_early: why training ended before its plan, else "".
        earlier: seconds that earlier attempts took.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    main: bool = True
    stopped_early: str = ""
    earlier: float = 0.0


def fit(
    module: UlmfitModule,
    data: lightning.LightningDataModule,
    config: FitConfig,
    trainer_config: TrainerConfig,
    logger_config: LoggerConfig,
    folder: Path | None,
    monitor: tuple[str, str],
    title: str,
    callbacks: Sequence[lightning.Callback] = (),
) -> FitResult:
    """Train `module`; afterwards it holds the weights to keep.

    Args:
        folder: where logs and checkpoints go; a checkpoint found there is resumed. None: nothing is written.
        monitor: metric that decides which weights are best, and "min" or "max".
        title: for the progress line.

    Raises:
        UlmfitError: the loss is not a number any more; with the step, the rate and advice.
        KeyboardInterrupt: Ctrl-C, once a checkpoint is written.
        Stopped: the same for a signal such as SIGTERM.
        NotFinished: the same for `max_time`; without a folder, training just ends then.
    """
    name, mode = monitor
    has_validation = not isinstance(data.val_dataloader(), list)
    validated = Validated(name, mode, config.keep)
    extra: list[lightning.Callback] = [*callbacks, NonFiniteGuard()]
    if has_validation:
        extra.append(validated)
    if config.patience is not None and has_validation:
        extra.append(EarlyStopping(name, mode=mode, patience=config.patience, check_on_train_epoch_end=False))
    resume = recovery = None
    if folder is not None:
        limit = seconds_of(trainer_config.max_time)
        recovery = Recovery(recovery_path(folder), trainer_config.checkpoint_minutes, limit)
        extra.append(recovery)
        resume = recovery_path(folder) if recovery_path(folder).is_file() else None
    with quiet_lightning():
        fresh = callable(getattr(data, "train", None))  # documents are made anew each epoch
        trainer = make_trainer(config, trainer_config, logger_config, folder, module, title, extra, fresh)
        try:
            run_training(trainer, module, data, ckpt_path=resume, weights_only=True)
        except SystemExit as end:  # what Lightning makes of Ctrl-C
            if isinstance(end.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from end
            raise
        result = FitResult(steps=trainer.global_step, main=trainer.is_global_zero)
        result.earlier = 0.0 if recovery is None else recovery.earlier
        loss = module.epoch_loss() or module.resumed_loss
        result.metrics = {} if loss is None else {"train_loss_epoch": loss}
        if trainer.should_stop and result.steps < trainer.estimated_stepping_batches:
            stale = any(isinstance(callback, EarlyStopping) and callback.stopped_epoch for callback in extra)
            result.stopped_early = f"no better {name} {config.patience} times" if stale else "the time is up"
            log.info("%s stopped early, at step %d: %s", title, result.steps, result.stopped_early)
        if has_validation and validated.step != trainer.global_step:  # max_steps or max_time ended an epoch early
            trainer.validate(module, datamodule=data, verbose=False)
    result.metrics |= validated.metrics
    if validated.weights is not None:
        module.load_state_dict(validated.weights)
        validated.weights = None
    return result


def run_training(
    trainer: lightning.Trainer, module: lightning.LightningModule, data: lightning.LightningDataModule, **options: Any
) -> None:
    """`trainer.fit`, which however it ends leaves no optimiser state, no gradients and no signal handlers.

    Trainer, module and callbacks refer to each other, so the garbage collector would get to them late.
    """
    try:
        with kept_signal_handlers():
            trainer.fit(module, datamodule=data, **options)
    finally:
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
        module.zero_grad(set_to_none=True)


def make_trainer(
    config: FitConfig,
    trainer_config: TrainerConfig,
    logger_config: LoggerConfig,
    folder: Path | None,
    module: UlmfitModule,
    title: str,
    callbacks: Sequence[lightning.Callback] = (),
    fresh_batches: bool = False,
) -> lightning.Trainer:
    """A Lightning trainer with the method's callbacks; loggers and progress are explicit."""
    method = method_callbacks(config.method, config.optim.lr, config.epochs, len(module.layer_groups()))
    # The log first: the progress line shows the epoch's loss that it logs.
    shown: list[lightning.Callback] = [TrainingLog()]
    shown += [Progress(title)] if trainer_config.enable_progress_bar else []
    return bare_trainer(
        trainer_config,
        callbacks=[*method, *shown, *callbacks, FreedMemory()],
        reload_dataloaders_every_n_epochs=1 if fresh_batches else 0,
        max_epochs=config.epochs,
        max_steps=config.max_steps if config.max_steps is not None else -1,
        clip=config.optim.clip,
        accumulate_grad_batches=config.optim.accumulate,
        val_check_interval=config.valid_every and config.valid_every * config.optim.accumulate,  # in batches
        check_val_every_n_epoch=None if config.valid_every else 1,
        logger=_loggers(logger_config, folder),
        log_every_n_steps=logger_config.log_every,
        plugins=[WholeFiles(), *_slurm()],
        default_root_dir=folder,
        max_time=None if folder is not None else trainer_config.max_time,  # else `Recovery` sees to it
    )


def bare_trainer(
    config: TrainerConfig, callbacks: Sequence[lightning.Callback], max_epochs: int, clip: float | None, **more: Any
) -> lightning.Trainer:
    """A Lightning trainer for this machine that logs and saves nothing unless told to.

    Raises:
        UsageError: a device, precision or strategy that this machine does not have.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.matmul_precision:
        torch.set_float32_matmul_precision(config.matmul_precision)
    gpus = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    gpus["gpu"] = any(gpus.values())
    if not gpus.get(config.accelerator, True):
        raise UsageError(
            f"trainer.accelerator is '{config.accelerator}', but this machine has none; use trainer=auto or trainer=cpu"
        )
    if config.cuda_graphs:
        callbacks = [*callbacks, CudaGraphs()]
    precision = resolve_precision(config)
    if precision == "16-mixed" and not (gpus["gpu"] and config.accelerator != "cpu"):
        raise UsageError("trainer.precision is '16-mixed', which needs a GPU; use auto or 32-true")
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "max_time": config.max_time, **more}
    quiet |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}

    def make(strategy: Any) -> lightning.Trainer:
        return lightning.Trainer(
            accelerator=config.accelerator,
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]
            deterministic=config.deterministic,
            max_epochs=max_epochs,
            gradient_clip_val=clip,
            use_distributed_sampler=False,  # our loaders shard themselves
            callbacks=list(callbacks),
            **quiet,
        )

    try:
        trainer = make(config.strategy)
        distributed = ranks_for(trainer, config)
        return trainer if distributed is None else make(distributed)
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
        # What is left is how many devices there are, and which strategy goes with them.
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise UsageError(
            f"Lightning does not take trainer.devices={config.devices} with trainer.strategy={config.strategy} and "
            f"trainer.accelerator={config.accelerator} ({reason:.200}); trainer=auto always works"
        ) from error


def check_trainer(config: TrainerConfig, logger: LoggerConfig) -> None:
    """Whether this machine can train as configured, to be asked before there is anything to train.

    Raises:
        UsageError: as `bare_trainer`, or a logger's package is missing.
    """
    for name in ("tensorboard", "wandb"):
        if getattr(logger, name) and importlib.util.find_spec(name) is None:
            raise UsageError(f"logger.{name}=true needs a package that is not here: pip install 'ulmfit[{name}]'")
    with quiet_lightning():
        bare_trainer(config, [], max_epochs=1, clip=None)


def _slurm() -> list[Any]:
    """Under SLURM, Lightning without its own way of saving and requeueing.

    On SIGUSR1 that saves wherever training is just then, and not where a run looks for its checkpoint.
    """
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        return [SLURMEnvironment(auto_requeue=False)]
    return []


def resolve_precision(config: TrainerConfig) -> str:
    """`config.precision`, where "auto" means bfloat16 products if the hardware has them, else float32.

    Raises:
        UsageError: a reduced precision that the processor only emulates or whose LSTM kernel is missing.
    """
    on_gpu = config.accelerator in ("gpu", "cuda") or (config.accelerator == "auto" and torch.cuda.is_available())
    if on_gpu:
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    else:
        native = config.accelerator in ("auto", "cpu") and cpu_multiplies_bfloat16()
    if config.precision == "auto":
        return "bf16-mixed" if native else "32-true"
    if str(config.precision).startswith("bf16") and not native:
        raise UsageError(
            f"trainer.precision is '{config.precision}', but this machine has no bfloat16 units; use 32-true or auto"
        )
    return str(config.precision)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without Lightning's hints about hardware, workers and cloud services."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _loggers(config: LoggerConfig, folder: Path | None) -> list[Logger] | bool:
    if folder is None:
        return False
    loggers: list[Logger] = []
    if config.csv:
        # A new file for each attempt: Lightning's logger deletes what an earlier one wrote.
        attempt = len(list((folder / "log").glob("attempt-*")))
        loggers.append(CSVLogger(folder, name="log", version=f"attempt-{attempt}"))
    if config.tensorboard:
        loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))
    if config.wandb:
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(WandbLogger(project=config.wandb_project, save_dir=folder))
    return loggers or False
