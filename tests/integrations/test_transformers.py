"""transformers' models are pruned exactly, and its Trainer trains them as a plain loop does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

import kfac_flat
from kfac_flat import FlatKFAC, NeuronPruner
from kfac_flat.integrations.transformers import FILE, NeuronPruning
from tests.pruning.by_hand import assert_same_tensors
from tests.pruning.lifecycle import assert_masked, assert_reloads, pruned

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def bert(attention: str = "sdpa", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 20, "max_position_embeddings": 12, **options}
    return BertForSequenceClassification(BertConfig(attn_implementation=attention, **sizes))


def vit(attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(attn_implementation=attention, image_size=8, patch_size=4, num_channels=1, **SIZES)
    )


def tokens(n: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (n, 1), generator=generator)
    ids = torch.randint(1, 20, (n, 8), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(8) < lengths).long()}


def images(n: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))}


# ---------------------------------------------------------------- the models

HEADS = {"bert": ("query", "key", "value"), "vit": ("q_proj", "k_proj", "v_proj")}
UNITS = {"bert": "intermediate.dense", "vit": "mlp.fc1"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("name", "make", "inputs"), [("bert", bert, tokens), ("vit", vit, images)])
def test_half_of_heads_and_hidden_units_go_exactly_and_the_rest_is_named(
    name: str, make: Callable[[str], nn.Module], inputs: Callable[[int], dict[str, Tensor]], attention: str
) -> None:
    x = inputs(5)
    x = {key: t.double() if t.is_floating_point() else t for key, t in x.items()}
    found = pruned(lambda: make(attention), x, x, {"bert": 0.71, "vit": 0.63}[name])
    assert_masked(found)
    assert_reloads(found)
    for layer, width in found.pruner.widths.items():
        if layer.endswith(HEADS[name]):
            assert (width < 24, width % 6) == (True, 0)  # whole heads
        elif layer.endswith(UNITS[name]):
            assert width < 32
        elif "pooler" not in layer:
            assert found.pruner.frozen[layer], layer
    layers = {layer.rpartition(".")[0] for layer in found.pruner.widths if layer.endswith(HEADS[name])}
    for layer in layers:
        kept = [found.pruner.survivors[f"{layer}.{part}"] for part in HEADS[name]]
        assert torch.equal(kept[0], kept[1])
        assert torch.equal(kept[0], kept[2])


# ---------------------------------------------------------------- the Trainer

EPOCHS, EXAMPLES, BATCH = 4, 24, 6
SCHEDULE = {"target": 0.4, "start": 1, "every": 1, "events": 2, "pace": "linear"}


def dataset(kind: str) -> list[dict[str, Tensor]]:
    x = tokens(EXAMPLES) if kind == "bert" else images(EXAMPLES)
    labels = torch.arange(EXAMPLES) % 3
    return [{**{key: t[i] for key, t in x.items()}, "labels": labels[i]} for i in range(EXAMPLES)]


def parts(kind: str) -> tuple[nn.Module, FlatKFAC, LRScheduler, NeuronPruner]:
    model = bert() if kind == "bert" else vit()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.05, momentum=0.9), model, mu=0.05, every=3)
    example = {key: t[None] for key, t in dataset(kind)[0].items() if key != "labels"}
    return model, optimizer, CosineAnnealingLR(optimizer, 16), NeuronPruner(model, optimizer, example, **SCHEDULE)


class InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return None


def trainer(kind: str, folder: Path, **options: Any) -> tuple[Trainer, NeuronPruning, NeuronPruner]:
    model, optimizer, scheduler, pruner = parts(kind)
    settings = {"report_to": "none", "save_strategy": "epoch", "disable_tqdm": True, "use_cpu": True, **options}
    arguments = TrainingArguments(
        str(folder), num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, logging_strategy="epoch", **settings
    )
    made = InOrder(
        model, arguments, train_dataset=dataset(kind), eval_dataset=dataset(kind), optimizers=(optimizer, scheduler)
    )
    made.model_accepts_loss_kwargs = (
        False  # else it leaves it to the model to average over micro-batches, which BERT does not
    )
    pruning = NeuronPruning(made, pruner)
    made.add_callback(pruning)
    return made, pruning, pruner


def by_hand(kind: str, accumulate: int = 1, clip: float = 1.0, bf16: bool = False) -> nn.Module:
    model, optimizer, scheduler, pruner = parts(kind)
    data = dataset(kind)
    for _ in range(EPOCHS):
        for begin in range(0, EXAMPLES, BATCH):
            batch = {key: torch.stack([item[key] for item in data[begin : begin + BATCH]]) for key in data[0]}
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**batch).loss
            (loss / accumulate).backward()
            if (begin // BATCH + 1) % accumulate == 0:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        pruner.step()
    assert pruner.sparsity > 0.39
    return model


@pytest.mark.parametrize(
    ("kind", "options", "same"),
    [
        ("bert", {}, {}),
        ("vit", {}, {}),
        ("bert", {"gradient_accumulation_steps": 2}, {"accumulate": 2}),
        ("vit", {"bf16": True}, {"bf16": True}),
        ("bert", {"max_grad_norm": 0.1}, {"clip": 0.1}),
    ],
)
def test_the_trainer_is_the_plain_loop_bit_for_bit(
    kind: str, options: dict[str, Any], same: dict[str, Any], tmp_path: Path
) -> None:
    made, _, _ = trainer(kind, tmp_path, save_only_model=False, **options)
    made.train()
    assert_same_tensors(made.model, by_hand(kind, **same))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedError


@pytest.mark.parametrize("saving", [{}, {"save_strategy": "steps", "save_steps": 3}])
@pytest.mark.parametrize(("kind", "step"), [("bert", 7), ("vit", 10), ("bert", 13)])
def test_a_training_that_was_stopped_goes_on_to_the_same_network(
    saving: dict[str, Any], kind: str, step: int, tmp_path: Path
) -> None:
    whole, _, _ = trainer(kind, tmp_path / "whole", **saving)
    whole.train()
    stopped, _, _ = trainer(kind, tmp_path / "stopped", **saving)
    stopped.add_callback(StopAt(step))
    with pytest.raises(InterruptedError):
        stopped.train()
    last = max((tmp_path / "stopped").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    again, pruning, _ = trainer(kind, tmp_path / "stopped", **saving)
    again.train(resume_from_checkpoint=pruning.restored(last))
    assert_same_tensors(again.model, whole.model)


@pytest.mark.parametrize(("kind", "make"), [("bert", bert), ("vit", vit)])
def test_a_checkpoint_loads_where_the_model_is_used(kind: str, make: Callable[[], nn.Module], tmp_path: Path) -> None:
    made, _, _ = trainer(kind, tmp_path)
    made.train()
    saved = torch.load(tmp_path / "checkpoint-16" / FILE, weights_only=True)
    model = kfac_flat.shrink(make(), saved["pruner"])
    model.load_state_dict(saved["model"])
    assert_same_tensors(model, made.model)


def test_rho_and_sizes_are_logged_to_tensorboard_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    made, _, pruner = trainer("vit", tmp_path, report_to="tensorboard")
    made.train()
    (events,) = (tmp_path / "logs").rglob("events*")
    read = EventAccumulator(str(events))
    read.Reload()
    after = [report.scalars()["pruning/neurons"] for report in pruner.history]
    dense = pruner.history[0].before.neurons
    assert [event.value for event in read.Scalars("train/pruning/neurons")] == [dense, *after[:-1]]
    assert min(event.value for event in read.Scalars("train/rho")) > 0


def test_the_best_of_several_sizes_is_not_loaded_into_the_last(tmp_path: Path) -> None:
    made, _, _ = trainer("vit", tmp_path, load_best_model_at_end=True, eval_strategy="epoch")
    with pytest.raises(ValueError, match="has become too small for them"):
        made.train()


def test_an_output_without_logits_needs_a_likelihood_of_its_own() -> None:
    class Naming(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scores": self.layer(x)}

    model = Naming()
    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1), model)
    model(torch.randn(4, 4))["scores"].sum().backward()
    with pytest.raises(TypeError, match="returns a dict without logits, so that no part of it is known"):
        optimizer.step()
