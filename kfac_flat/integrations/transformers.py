"""The Trainer of transformers: a callback that steps a NeuronPruner; FlatKFAC is given as ``optimizers=``.

Needs the extra ``transformers``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kfac_flat.optimizer import FlatKFAC
from kfac_flat.pruning.scheduler import NeuronPruner
from kfac_flat.structure import unwrap

FILE = "pruned.pt"


class NeuronPruning(TrainerCallback):
    """Remove neurons between epochs, log what is there, and save pruner and model with each checkpoint.

    An epoch's removal comes when the next one begins (that of the last epoch when training ends), so that evaluation,
    metrics and checkpoints of an epoch are those of one model. ``rho`` (with FlatKFAC) and
    :meth:`~kfac_flat.NeuronPruner.scalars` are logged.

    Args:
        trainer: The Trainer that this is a callback of.
        pruner: The pruner of its model and of the optimizer that the Trainer was given.

    Example:
        ``trainer.add_callback(NeuronPruning(trainer, pruner))``
    """

    def __init__(self, trainer: Trainer, pruner: NeuronPruner) -> None:
        self._trainer, self._pruner = trainer, pruner

    def restored(self, checkpoint: str | os.PathLike[str]) -> str:
        """Cut the dense model to the shape of a checkpoint, and load its weights.

        The Trainer then loads the weights again, or leaves them alone: of models such as ViT it saves them under names
        that it does not find when it resumes.

        Args:
            checkpoint: A folder that the Trainer has written.

        Returns:
            The folder, as in ``trainer.train(resume_from_checkpoint=pruning.restored(folder))``.
        """
        saved = torch.load(Path(checkpoint, FILE), map_location="cpu", weights_only=True)
        self._pruner.load_state_dict(saved["pruner"])
        self._model.load_state_dict(saved["model"])
        return os.fspath(checkpoint)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Refuse what would fail at the end.

        Raises:
            ValueError: if the best of several models, of different sizes, is to be loaded into the last.
        """
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end=True would load weights into a model that has become too small for them: "
                "leave it out, and load the best checkpoint into a new model with kfac_flat.shrink"
            )

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the epoch before."""
        self._end_epochs(state)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log what has been trained in this epoch."""
        optimizer = getattr(self._trainer.optimizer, "optimizer", None)  # inside of Accelerate's
        rho = {"rho": optimizer.rho} if isinstance(optimizer, FlatKFAC) else {}
        self._trainer.log({**rho, **self._pruner.scalars()})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """End the last epoch of all."""
        self._end_epochs(state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save the pruner and what :func:`kfac_flat.shrink` makes room for."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir or ".", f"checkpoint-{state.global_step}")
            saved = {"pruner": self._pruner.state_dict(), "model": self._model.state_dict()}
            torch.save(saved, folder / FILE)

    @property
    def _model(self) -> nn.Module:
        model = self._trainer.model
        assert model is not None
        return unwrap(model)

    def _end_epochs(self, state: TrainerState) -> None:
        """Step the pruner for the epochs that are over, some of which may lie before a checkpoint."""
        while self._pruner.epoch < int(state.epoch or 0):
            self._pruner.step()
