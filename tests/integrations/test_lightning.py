"""Lightning runs FlatKFAC and NeuronPruner as a plain loop does, and goes on from its own checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from kfac_flat import CutError, FlatKFAC, NeuronPruner
from kfac_flat.integrations.lightning import NeuronPruning, load_pruned
from tests.pruning.by_hand import assert_same_tensors

pytestmark = [
    # What Lightning advises for data that are less small.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),  # which it does
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # nor should it be
]

EPOCHS, BATCHES = 5, 6
SCHEDULE = {"target": 0.5, "start": 2, "every": 1, "events": 2, "pace": "linear"}


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * BATCHES, 1, 6, 6, generator=generator)
    return TensorDataset(x, x.flatten(1)[:, :3].argmax(1))


def loader() -> DataLoader[Any]:
    return DataLoader(data(), batch_size=8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 12), nn.ReLU(), nn.Linear(12, 3)),
    )


def wrapped(model: nn.Module, network: nn.Module) -> FlatKFAC:
    return FlatKFAC(SGD(network.parameters(), lr=0.05, momentum=0.9), model, mu=0.05, every=4)


class Classifier(LightningModule):
    """FlatKFAC over the network inside, or over the module as a whole."""

    def __init__(self, inside: bool = True) -> None:
        super().__init__()
        self.net, self.inside = network(), inside
        self.example_input_array = data()[:1][0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x) if self.inside else self(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = wrapped(self.net if self.inside else self, self.net)
        return {"optimizer": optimizer, "lr_scheduler": CosineAnnealingLR(optimizer, EPOCHS)}


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "max_epochs": EPOCHS}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {**silent, "accelerator": "cpu", "enable_checkpointing": saves, **options}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **options)


def pruning() -> NeuronPruning:
    return NeuronPruning(**SCHEDULE)


def by_hand(accumulate: int = 1, clip: float | None = None, bf16: bool = False) -> tuple[nn.Module, NeuronPruner]:
    """Train in a plain loop."""
    model = network()
    optimizer = wrapped(model, model)
    schedule = CosineAnnealingLR(optimizer, EPOCHS)
    pruner = NeuronPruner(model, optimizer, data()[:1][0], **SCHEDULE)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(loader()):
            if i % accumulate == 0:
                optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = nn.functional.cross_entropy(model(x), y)
            (loss / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
        schedule.step()
        pruner.step()
    return model, pruner


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, {}),
        ({"accumulate_grad_batches": 3}, {"accumulate": 3}),
        ({"gradient_clip_val": 0.5}, {"clip": 0.5}),
        ({"precision": "bf16-mixed"}, {"bf16": True}),
    ],
    ids=["plain", "accumulating", "clipping", "bfloat16"],
)
@pytest.mark.parametrize("inside", [True, False], ids=["network", "module"])
def test_a_fit_is_the_plain_loop_bit_for_bit(
    options: dict[str, Any], same: dict[str, Any], inside: bool, tmp_path: Path
) -> None:
    module, callback = Classifier(inside), pruning()
    trainer(tmp_path, callback, **options).fit(module, loader())
    model, pruner = by_hand(**same)
    assert_same_tensors(module.net, model)
    found = callback.pruner
    assert found is not None
    assert found.sparsity == pruner.sparsity == 0.5
    assert [report.epoch for report in found.history] == [1, 2, 3, 4, 5]
    assert [bool(report) for report in found.history] == [False, True, True, False, False]


class Resumable(DataLoader[Any]):
    """A loader that goes on in the middle of an epoch."""

    def __init__(self) -> None:
        super().__init__(data(), batch_size=8)
        self.seen = 0

    def __iter__(self) -> Iterator[Any]:
        begin, self.seen = self.seen, 0
        for i, batch in enumerate(super().__iter__()):
            if i >= begin:
                self.seen = (i + 1) % BATCHES
                yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class StopAt(Callback):
    """Kills the training at some place."""

    def __init__(self, place: str, epoch: int, batch: int = 0) -> None:
        self.epoch, self.batch = epoch, batch
        setattr(self, place, self._stop)

    def _stop(self, trainer: Trainer, module: LightningModule, *args: Any) -> None:
        if trainer.current_epoch == self.epoch and (len(args) < 2 or args[-1] == self.batch):
            raise InterruptedError


KINDS: dict[str, Callable[[Path], ModelCheckpoint]] = {
    "end of the epoch": lambda folder: ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True),
    "validation": lambda folder: ModelCheckpoint(folder, save_last=True, monitor="val_loss"),
    "every second step": lambda folder: ModelCheckpoint(folder, save_last=True, every_n_train_steps=2),
}
PLACES = {
    "begin": ("on_train_epoch_start", 0),
    "middle": ("on_train_batch_end", 3),
    "validated": ("on_validation_end", 0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_a_training_that_was_stopped_goes_on_to_the_same_network(kind: str, place: str, tmp_path: Path) -> None:
    module, callback = Classifier(), pruning()
    trainer(tmp_path, callback).fit(module, loader(), loader())

    hook, batch = PLACES[place]
    stopped = trainer(tmp_path, pruning(), KINDS[kind](tmp_path), StopAt(hook, 2, batch), num_sanity_val_steps=0)
    with pytest.raises(InterruptedError):
        stopped.fit(Classifier(), Resumable(), loader())

    resumed, again = Classifier(), pruning()
    trainer(tmp_path, again, KINDS[kind](tmp_path)).fit(
        resumed, Resumable(), loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert_same_tensors(resumed, module)
    assert again.pruner is not None
    assert callback.pruner is not None
    assert again.pruner.epoch == EPOCHS
    assert again.pruner.widths == callback.pruner.widths


def saved(folder: Path) -> tuple[Classifier, ModelCheckpoint]:
    """Train a module to the end, with a checkpoint after each epoch."""
    module, checkpoints = Classifier(), ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1, save_last=True)
    trainer(folder, pruning(), checkpoints).fit(module, loader(), loader())
    return module, checkpoints


def test_every_file_of_model_checkpoint_loads_into_a_module_of_its_shape(tmp_path: Path) -> None:
    module, checkpoints = saved(tmp_path)
    widths = []
    for path in sorted(checkpoints.best_k_models, key=lambda path: Path(path).stat().st_mtime_ns):
        loaded = load_pruned(Classifier(), path)
        (found,) = trainer(tmp_path).validate(loaded, loader(), verbose=False)
        assert found["val_loss"] == pytest.approx(float(checkpoints.best_k_models[path]), rel=1e-6)
        widths.append(sum(m.weight.shape[0] for m in loaded.net if isinstance(m, (nn.Conv2d, nn.Linear))))
    assert widths == sorted(widths, reverse=True)  # each is the network that its metric was measured on
    assert len(set(widths)) == 3
    assert_same_tensors(
        load_pruned(Classifier(), checkpoints.last_model_path), module
    )  # none was due after the last epoch


def test_a_checkpoint_of_another_run_is_refused_with_advice(tmp_path: Path) -> None:
    trainer(tmp_path, ModelCheckpoint(tmp_path, filename="dense"), max_epochs=1).fit(Classifier(), loader())
    with pytest.raises(ValueError, match="no checkpoint of a fit with a NeuronPruning: use load_from_checkpoint"):
        load_pruned(Classifier(), tmp_path / "dense.ckpt")
    saved(tmp_path / "pruned")
    with pytest.raises(CutError):
        load_pruned(load_pruned(Classifier(), tmp_path / "pruned/last.ckpt"), tmp_path / "pruned/last.ckpt")


def test_a_run_without_pruning_goes_on_with_it(tmp_path: Path) -> None:
    dense, callback = ModelCheckpoint(tmp_path), pruning()
    trainer(tmp_path, dense, max_epochs=1).fit(Classifier(), loader())
    trainer(tmp_path, callback, ModelCheckpoint(tmp_path)).fit(Classifier(), loader(), ckpt_path=dense.best_model_path)
    assert callback.pruner is not None
    assert callback.pruner.sparsity == 0.5


def test_weights_that_no_pruning_explains_are_refused_as_ever(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path)
    trainer(tmp_path, checkpoints, max_epochs=1).fit(Classifier(), loader())
    other = Classifier()
    other.net[-1] = nn.Linear(12, 4)
    with pytest.raises(RuntimeError, match=r"size mismatch for net\.8\.weight"):
        trainer(tmp_path, pruning(), ModelCheckpoint(tmp_path)).fit(
            other, loader(), ckpt_path=checkpoints.best_model_path
        )


def test_rho_sparsity_and_sizes_are_logged_once_an_epoch(tmp_path: Path) -> None:
    logger, callback = TensorBoardLogger(tmp_path, name="", version="logs"), pruning()
    trainer(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(Classifier(), loader())
    read = EventAccumulator(str(tmp_path / "logs"))
    read.Reload()
    assert callback.pruner is not None
    for name in ("sparsity", "neurons", "parameters", "macs", "width/0", "width/3"):
        logged = [event.value for event in read.Scalars(f"pruning/{name}")]
        after = [report.scalars()[f"pruning/{name}"] for report in callback.pruner.history]
        assert logged == pytest.approx([after[0], *after[:-1]]), name  # an epoch's removal is seen in the next one
    rho = [event.value for event in read.Scalars("rho")]
    assert len(rho) == EPOCHS
    assert min(rho) > 0


def test_a_dry_run_of_one_batch_passes(tmp_path: Path) -> None:
    callback = NeuronPruning(target=0.5, start=1, events=1)
    trainer(tmp_path, callback, fast_dev_run=True).fit(Classifier(), loader(), loader())
    assert callback.pruner is not None
    assert callback.pruner.sparsity == 0.5


def test_a_plain_optimizer_prunes_the_module_as_a_whole(tmp_path: Path) -> None:
    class Plain(Classifier):
        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.05, momentum=0.9)

    callback = NeuronPruning(data()[:1][0], **SCHEDULE)
    trainer(tmp_path, callback).fit(Plain(), loader())
    assert callback.pruner is not None
    assert callback.pruner.widths.keys() == {"net.0", "net.3", "net.6", "net.8"}
    assert callback.pruner.sparsity == 0.5


def test_what_cannot_be_followed_is_refused_with_advice(tmp_path: Path) -> None:
    class Without(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = None

    with pytest.raises(ValueError, match=r"NeuronPruning\(example_inputs\) needs what the model is called with"):
        trainer(tmp_path, pruning()).fit(Without(), loader())

    class Elsewhere(Classifier):
        def configure_optimizers(self) -> Any:
            return wrapped(nn.Sequential(self.net), self.net)

    with pytest.raises(ValueError, match="is no part of the LightningModule: give FlatKFAC one that is"):
        trainer(tmp_path, pruning()).fit(Elsewhere(), loader())

    callback = pruning()
    trainer(tmp_path, callback, max_epochs=1).fit(module := Classifier(), loader())
    with pytest.raises(ValueError, match=r"has pruned in another fit: to go on from there.*as ckpt_path"):
        trainer(tmp_path, callback).fit(module, loader())


def test_wrappers_of_the_optimizer_answer_as_it_does(tmp_path: Path) -> None:
    class Looking(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            optimizer = self.optimizers()
            assert isinstance(optimizer, FlatKFAC)
            assert optimizer.rho == self.trainer.optimizers[0].rho
            with optimizer.toggle_model():
                assert all(p.requires_grad for p in self.parameters())

    trainer(tmp_path, max_epochs=1).fit(Looking(), loader())
