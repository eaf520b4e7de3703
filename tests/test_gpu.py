"""The same on a GPU, and nothing in a step that makes the host wait for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from kfac_flat import FlatKFAC, NeuronPruner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_synchronisation")
@pytest.mark.parametrize("autocast", [False, True])
def test_training_and_pruning_on_a_gpu_without_host_synchronisation(autocast: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    ).cuda()  # fmt: skip
    optimizer = FlatKFAC(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model, mu=0.1, every=2)
    x, y = torch.randn(32, 3, 16, 16, device="cuda"), torch.arange(32, device="cuda") % 10
    pruner = NeuronPruner(model, optimizer, x[:1], target=0.5, start=1, every=1, events=1)
    for step in range(8):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if step == 2:  # the first refresh has looked for the active layer, and waited once
            torch.cuda.set_sync_debug_mode("error")
        optimizer.step()
        if step == 5:
            torch.cuda.set_sync_debug_mode("default")
            assert pruner.step()
    assert optimizer.rho > 0
    assert optimizer.skipped == 0
    assert all(p.isfinite().all() for p in model.parameters())
