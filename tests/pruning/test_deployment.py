"""A pruned model is an ordinary small one: it is rebuilt, exported, compiled and copied like any other."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn, optim

from kfac_flat import FlatKFAC, shrink
from tests.pruning.by_hand import Remaining, batch, network, pruner_of, train
from tests.pruning.masking import distance, outputs_of, prune_at_random, pruner_for
from tests.pruning.nets import CASES

EXPORTED = ["mlp", "residual", "densenet", "depthwise_separable", "squeeze_excite", "permuted_flatten"]


def pruned(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any], Any]:
    """Return a dense model, the same one pruned, the manifest and inputs."""
    model, inputs = CASES[name].build()
    dense = copy.deepcopy(model)
    pruner = pruner_for(model, inputs)
    prune_at_random(pruner, model)
    return dense, model, pruner.state_dict(), inputs


def small(name: str) -> tuple[nn.Module, Tensor]:
    """Return a pruned model in eval mode and its inputs, in the precision in which models are deployed."""
    _, model, _, x = pruned(name)
    return model.eval().float(), x.float()


def trained() -> tuple[nn.Sequential, FlatKFAC, Any]:
    """Return a model pruned in two events during a training, its optimizer and its pruner."""
    torch.manual_seed(0)
    model, (x, y) = network(), batch()
    optimizer = FlatKFAC(optim.Adam(model.parameters(), lr=0.01), model, mu=0.05)
    pruner = pruner_of(model, optimizer, x, events=2)
    for _ in range(2):
        train(model, optimizer, x, y, 2)
        assert pruner.step()
    train(model, optimizer, x, y, 1)
    return model, optimizer, pruner


# ---------------------------------------------------------------- rebuilt


@pytest.mark.parametrize("name", CASES)
def test_a_shrunk_fresh_model_with_the_weights_computes_the_same_bit_for_bit(name: str) -> None:
    dense, model, manifest, inputs = pruned(name)
    file = io.BytesIO()
    torch.save({"pruner": manifest, "model": model.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = shrink(CASES[name].build(seed=5)[0], saved["pruner"])
    assert distance(outputs_of(fresh, inputs), outputs_of(model, inputs)) > 1e-3  # before the weights are loaded
    fresh.load_state_dict(saved["model"])
    for training in (True, False):
        found, expected, whole = (outputs_of(m.train(training), inputs) for m in (fresh, model, dense))
        assert all(map(torch.equal, found, expected))
        assert distance(found, whole) > 1e-3


def test_a_model_without_data_is_shrunk_and_takes_the_weights_over() -> None:
    model, _, pruner = trained()
    with torch.device("meta"):
        fresh = network()
    shrink(fresh, pruner.state_dict()).load_state_dict(model.state_dict(), assign=True)
    x, _ = batch()
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_a_model_that_is_shrunk_in_inference_mode_can_be_trained() -> None:
    _, _, pruner = trained()
    fresh = network()
    with torch.inference_mode():
        shrink(fresh, pruner.state_dict())
    losses = train(fresh, optim.SGD(fresh.parameters(), lr=0.1), *batch(), steps=2)
    assert losses[0] != losses[1]


def test_the_weights_load_into_a_smaller_class_written_by_hand() -> None:
    model, _, pruner = trained()
    smaller = network(Remaining.after(pruner).widths)
    smaller.load_state_dict(model.state_dict())
    assert repr(smaller) == repr(model)
    x, _ = batch()
    for training in (True, False):
        assert torch.equal(smaller.train(training)(x), model.train(training)(x))


# ---------------------------------------------------------------- copied


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_trains_on_alone(how: Any) -> None:
    model, *_ = trained()
    before = copy.deepcopy(model.state_dict())
    (x, y), copied = batch(), how(model)
    losses = train(copied, optim.SGD(copied.parameters(), lr=0.1), x, y, 2)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert losses == train(model, optim.SGD(model.parameters(), lr=0.1), x, y, 2)


def test_nothing_of_the_dense_model_is_held_or_saved() -> None:
    model, optimizer, _ = trained()
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    for t in tensors:
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size()
    sizes = []
    for m in (model, network()):
        file = io.BytesIO()
        torch.save(m.state_dict(), file)
        sizes.append(file.tell())
    assert sizes[0] < sizes[1]


# ---------------------------------------------------------------- compiled and exported


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_pruned_model_is_compiled_and_trains_on(backend: str) -> None:
    torch.compiler.reset()
    model = trained()[0]  # optimizer and pruner are gone, and with them what they had hung on the model
    (x, y), plain = batch(), copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    found, expected = (train(m, optim.SGD(m.parameters(), lr=0.1), x, y, 3) for m in (compiled, plain))
    assert found == pytest.approx(expected, rel=1e-5)
    for m in (compiled, plain):
        m.eval()
    with torch.no_grad():
        assert torch.allclose(compiled(x[:5]), plain(x[:5]), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("name", EXPORTED)
def test_an_exported_program_computes_the_same_for_any_batch_size(name: str) -> None:
    model, x = small(name)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    shapes = {name: t.shape for name, t in program.state_dict.items()}
    assert shapes == {name: t.shape for name, t in model.state_dict().items()}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n in (1, 3, len(x)):
        assert torch.equal(loaded(x[:n]), model(x[:n]))


def test_a_model_is_exported_in_the_middle_of_its_training() -> None:
    model, optimizer, pruner = trained()
    x, y = batch()
    program = torch.export.export(model.eval(), (x,))
    assert torch.equal(program.module()(x), model(x))
    train(model.train(), optimizer, x, y, 2)
    assert optimizer.rho > 0
    assert pruner.finished


# torch's own exporter still does what torch's own pytree deprecates.
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", EXPORTED)
def test_an_onnx_file_holds_the_small_weights_and_computes_the_same(name: str, tmp_path: Path) -> None:
    model, x = small(name)
    path = tmp_path / "small.onnx"
    torch.onnx.export(
        model, (x,), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("n")},), external_data=False, verbose=False
    )  # fmt: skip
    stored = {t.name: tuple(t.dims) for t in onnx.load(path).graph.initializer}
    matrices = {n: tuple(p.shape) for n, p in model.named_parameters() if p.dim() > 1}
    assert matrices.items() <= stored.items()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    for n in (1, 3, len(x)):
        (found,) = session.run(None, {entry.name: x[:n].numpy()})
        assert distance([torch.from_numpy(found)], [model(x[:n]).detach()]) < 1e-5
