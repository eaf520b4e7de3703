"""Lightning: a callback that steps a NeuronPruner; FlatKFAC needs none, ``configure_optimizers`` returns it.

Needs the extra ``lightning``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from kfac_flat.distributed import rewrap
from kfac_flat.optimizer import FlatKFAC
from kfac_flat.pruning.scheduler import NeuronPruner
from kfac_flat.pruning.surgery import shrink
from kfac_flat.structure import unwrap
from kfac_flat.wrapper import OptimizerWrapper


class NeuronPruning(Callback):
    """Remove neurons between training epochs, with a :class:`~kfac_flat.NeuronPruner`, and log what is there.

    What is pruned is the module that the optimizer of ``configure_optimizers`` was given, where that is a
    :class:`~kfac_flat.FlatKFAC`, otherwise the whole LightningModule. An epoch's removal comes when the next one begins
    (that of the last epoch when training ends), so that validation, metrics and checkpoints of an epoch are those of
    one model. ``rho`` (with FlatKFAC) and :meth:`~kfac_flat.NeuronPruner.scalars` are logged. Checkpoints hold the
    pruner's state, and ``trainer.fit(..., ckpt_path=...)`` goes on from them with a module that is built as at the
    start.

    Args:
        example_inputs: What the pruned module is called with, such as one batch ``x[:1]``; None for the
            LightningModule's ``example_input_array``.
        **options: Those of :class:`~kfac_flat.NeuronPruner`.

    Attributes:
        pruner: The pruner, once the fit has begun.

    Raises:
        ValueError: when the fit begins, if there are no example inputs or several optimizers, or the callback has
            pruned in another fit already.

    Example:
        >>> import logging, warnings
        >>> from torch import nn
        >>> class Classifier(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        ...     def training_step(self, batch, batch_idx):
        ...         x, y = batch
        ...         return nn.functional.cross_entropy(self.net(x), y)
        ...     def configure_optimizers(self):
        ...         return FlatKFAC(torch.optim.SGD(self.net.parameters(), lr=0.1), self.net)
        >>> logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        >>> data = torch.utils.data.TensorDataset(torch.randn(48, 4), torch.randint(3, (48,)))
        >>> quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
        >>> pruning = NeuronPruning(torch.randn(1, 4), target=0.5, start=1, events=1)
        >>> trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=pruning, enable_checkpointing=False, **quiet)
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=16))
        >>> pruning.pruner.widths
        {'0': 4, '2': 3}
    """

    def __init__(self, example_inputs: Any = None, **options: Any) -> None:
        self._example_inputs, self._options = example_inputs, options
        self.pruner: NeuronPruner | None = None
        self._path = ""
        self._restored: dict[str, Any] | None = None
        self._weights: dict[str, Tensor] = {}
        self._handle: RemovableHandle | None = None

    # ---------------------------------------------------------------- beginning

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep back the weights of a smaller model, which Lightning loads before there is an optimizer to cut along."""
        if stage != "fit":
            return
        if self.pruner is not None:
            raise ValueError(
                "this NeuronPruning has pruned in another fit: to go on from there, give a Trainer with a new one a "
                "module built as at the start, and the checkpoint as ckpt_path"
            )
        self._restored, self._weights = None, {}
        self._handle = pl_module.register_load_state_dict_pre_hook(self._keep_back)  # type: ignore[no-untyped-call]

    def _keep_back(self, module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
        """Let weights of other shapes wait until the module has been cut."""
        for name, own in module.state_dict().items():
            if isinstance(own, Tensor) and name in state_dict and state_dict[name].shape != own.shape:
                self._weights[name], state_dict[name] = state_dict[name], own

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the pruner, and bring it to where a checkpoint was."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if len(trainer.optimizers) != 1:
            raise ValueError(f"NeuronPruning follows one optimizer, not {len(trainer.optimizers)}")
        optimizer = trainer.optimizers[0]
        model = unwrap(optimizer.model) if isinstance(optimizer, OptimizerWrapper) else pl_module
        example = pl_module.example_input_array if self._example_inputs is None else self._example_inputs
        if example is None:
            raise ValueError("NeuronPruning(example_inputs) needs what the model is called with, such as x[:1]")
        self._path = _path_of(model, pl_module)
        self.pruner = NeuronPruner(model, optimizer, example, **self._options)
        if self._restored is not None:
            self.pruner.load_state_dict(self._restored["pruner"])
        if self._weights:
            pl_module.load_state_dict({**pl_module.state_dict(), **self._weights})
        self._restored, self._weights = None, {}

    # ---------------------------------------------------------------- stepping

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the epoch before: now that a checkpoint has been written of the model that was validated.

        The start of an epoch is not announced after every kind of checkpoint, that of a batch is.
        """
        self._end_epochs(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the last epoch of all."""
        self._end_epochs(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what has been trained in this epoch."""
        assert self.pruner is not None
        optimizer = trainer.optimizers[0]
        rho = {"rho": optimizer.rho} if isinstance(optimizer, FlatKFAC) else {}
        pl_module.log_dict({**rho, **self.pruner.scalars()})

    def _end_epochs(self, trainer: Trainer) -> None:
        """Step the pruner for the epochs that are over, some of which may lie before a checkpoint."""
        assert self.pruner is not None
        wrapper = trainer.model
        while self.pruner.epoch < trainer.current_epoch:
            with rewrap(wrapper) if isinstance(wrapper, DistributedDataParallel) else nullcontext():
                self.pruner.step()

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the pruner's state, and the name of what it prunes within the LightningModule."""
        return {} if self.pruner is None else {"module": self._path, "pruner": self.pruner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there is a pruner."""
        self._restored = state_dict


def load_pruned(module: LightningModule, path: str | os.PathLike[str]) -> LightningModule:
    """Cut a LightningModule that is built as at the start to a checkpoint's shape, and load its weights.

    In place of ``load_from_checkpoint``, for whose weights the dense module is too large.

    Args:
        module: The dense module; changed in place.
        path: A checkpoint of a fit with a :class:`NeuronPruning`, such as ModelCheckpoint's ``best_model_path``.

    Returns:
        The module.

    Raises:
        ValueError: if the checkpoint holds no such state.
        CutError: if the module is not the one that was pruned.
    """
    checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    state = checkpoint.get("callbacks", {}).get(NeuronPruning.__qualname__)
    if state is None:
        raise ValueError(f"{path} is no checkpoint of a fit with a NeuronPruning: use load_from_checkpoint")
    shrink(module.get_submodule(state["module"]), state["pruner"])
    module.load_state_dict(checkpoint["state_dict"])
    return module


def _path_of(model: nn.Module, pl_module: LightningModule) -> str:
    """Return the name of what is pruned within the LightningModule.

    Raises:
        ValueError: if it is no part of it.
    """
    for name, module in pl_module.named_modules():
        if module is model:
            return str(name)
    raise ValueError("the optimizer's model is no part of the LightningModule: give FlatKFAC one that is")
