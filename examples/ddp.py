"""HGNP in several processes: DistributedDataParallel under torchrun, each process with its part of every batch.

The loop is that of one process. FlatKFAC reduces what it reads and adds over the processes, NeuronPruner removes the
same neurons in all of them, and ``with rewrap(model)`` lets the wrapper take up the smaller parameters. At the end all
processes compare their weights. The images are scikit-learn's digits.

Run it with ``torchrun --nproc-per-node 2 -m examples.ddp``, or in one process with ``python -m examples.ddp``;
``--help`` tells the options. On CPUs the processes talk over gloo, on GPUs over NCCL.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from examples.digits import DigitsNet, Images, accuracy, load_data, share, whole
from kfac_flat import FlatKFAC, NeuronPruner, rewrap


def join_processes() -> torch.device:
    """Join those that torchrun has started, if it has; returns the device of this one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def own_part(data: Images, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's part of batches of ``size``; all processes shuffle alike."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for images, labels in data.batches(size, generator):
        yield images[rank::ranks], labels[rank::ranks]


def train(options: argparse.Namespace, device: torch.device) -> tuple[nn.Module, NeuronPruner]:
    """Train a network that loses neurons on the way."""
    train_set, test_set = load_data(str(device))
    torch.manual_seed(options.seed)
    shuffle = torch.Generator().manual_seed(options.seed)
    network = DigitsNet(options.width).to(device)
    model = DistributedDataParallel(network)

    optimizer = FlatKFAC(SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4), model)
    removals = max(1, options.epochs // 2)
    pruner = NeuronPruner(network, optimizer, train_set.images[:1], target=options.target, start=1, events=removals)
    schedule = OneCycleLR(optimizer, 0.1, epochs=options.epochs, steps_per_epoch=len(train_set.labels) // 64)

    for epoch in range(options.epochs):
        for images, labels in own_part(train_set, 64, shuffle):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
        with rewrap(model):
            pruner.step()
        if dist.get_rank() == 0:
            found = f"accuracy {accuracy(network, test_set):.2f} %, rho {optimizer.rho:.3g}"
            print(f"epoch {epoch + 1}: {pruner.progress:.0%} of neurons removed, {found}")
            network.train()
    return network, pruner


def assert_replicas(network: nn.Module) -> None:
    """See that every process has come to the same weights.

    Raises:
        RuntimeError: if one has not.
    """
    own = torch.cat([p.detach().flatten() for p in network.parameters()])
    of_rank_0 = own.clone()
    dist.broadcast(of_rank_0, src=0)
    if not torch.equal(own, of_rank_0):
        raise RuntimeError(f"rank {dist.get_rank()} has come to other weights than rank 0")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.ddp",
        description="HGNP with DistributedDataParallel, on scikit-learn's digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=whole(1), default=8, help="of training")
    parser.add_argument("--width", type=whole(2), default=16, help="channels of the first layers")
    parser.add_argument("--target", type=share, default=0.5, help="share of neurons to remove")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    options = parser.parse_args(arguments)
    device = join_processes()
    try:
        network, pruner = train(options, device)
        assert_replicas(network)
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} processes, the same weights in all: {pruner.size}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
