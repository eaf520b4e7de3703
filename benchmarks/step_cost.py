"""What a step of FlatKFAC costs: time and peak memory, relative to the optimizer that it wraps.

Every row trains the same network on the same batch with an optimizer of its own, one step of each in turn, so that
whatever else the machine does meets all of them; the ratio to the bare step is taken round by round, and its median
told. FlatKFAC's steps are of three kinds, each a row: between refreshes, a refresh that reads the layer which attains
the maximum, and one that surveys all layers. What a schedule costs per step follows from these. Of a survey, the part
that brings the eigenpairs up to date has a row of its own, on top of a bare step. Beside them stand SAM,
the Hessian's spectral radius by ten products with it, and BackPACK's own Kronecker factors with their decompositions,
which know of few kinds of layers. Peak memory is that of all tensors alive at once.

Run it with ``python -m benchmarks.step_cost`` (``pip install -e ".[benchmark]"``); ``--help`` tells the options,
``--widths`` and ``--batch-sizes`` measure one network at several of them instead, ``--report`` writes the page
(:mod:`benchmarks.cost_page`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from backpack import backpack, extend
from backpack.extensions import KFAC
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from baselines import SAM, SpectralRadius
from benchmarks import cost_page
from benchmarks.commands import Parser, begin
from benchmarks.memory import Allocated
from benchmarks.networks import CifarNet
from benchmarks.records import circumstances, progress_bar, write_tables
from benchmarks.report import write_page
from benchmarks.saliency_cost import mlp, resnet18_cifar
from benchmarks.tasks import CRITERION
from examples.digits import whole
from examples.torchvision_models import models
from kfac_flat import FlatKFAC
from kfac_flat.curvature.layers import input_dim, is_layer
from kfac_flat.curvature.radius import Eigenvectors, LayerData
from kfac_flat.curvature.tracker import RadiusTracker
from kfac_flat.curvature.twin import quiet_hooks

Ratios = dict[str, float]
Make = Callable[[nn.Module], Optimizer]

# ---------------------------------------------------------------- networks


def vgg16_bn_cifar() -> tuple[nn.Module, tuple[int, ...]]:
    """VGG-16 with BatchNorm for images of 32 x 32 pixels: one linear layer behind the convolutions."""
    features = models.vgg16_bn(num_classes=10).features
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512, 10)), (3, 32, 32)


def small_vit() -> tuple[nn.Module, tuple[int, ...]]:
    """Four blocks of width 128 on patches of 4 x 4 pixels."""
    vit = models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=10
    )
    return vit, (3, 32, 32)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "resnet18": resnet18_cifar,
    "vgg16_bn": vgg16_bn_cifar,
    "mlp": mlp,
    "vit": small_vit,
}

# ---------------------------------------------------------------- rows

NEVER = 10**9


def sgd(model: nn.Module) -> Optimizer:
    """Make the bare optimizer."""
    return SGD(model.parameters(), lr=1e-3, momentum=0.9)


def flat(**options: Any) -> Make:
    """Make FlatKFAC around it."""
    return lambda model: FlatKFAC(sgd(model), model, **options)


BARE, BETWEEN = "bare SGD", "between refreshes"
EIGENPAIRS = {f"eigenpairs of all layers, {part} batch": share for part, share in (("quarter", 0.25), ("full", 1.0))}
EXACT = "exact factors and eigh, full batch"
LARGEST = 2048  # size of a factor beyond which decomposing it at every step is not waited for


def with_sam(model: nn.Module) -> Optimizer:
    """Make SAM around it."""
    return SAM(sgd(model), model, CRITERION)


def with_hessian(model: nn.Module) -> Optimizer:
    """Make the penalty on the Hessian's spectral radius, with ten power steps each time."""
    return SpectralRadius(sgd(model), model, CRITERION, iterations=10)


def with_factors(model: nn.Module) -> Optimizer:
    """Make the bare optimizer with BackPACK's own factors, read on a copy, and their decomposition before each step."""
    extended, loss = copy.deepcopy(model), extend(nn.CrossEntropyLoss())
    for module in extended.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # its hooks do not get along with it
    extend(extended)
    inputs: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, x: inputs.__setitem__(slice(None), x))
    optimizer = sgd(model)

    def decompose(*_: Any) -> None:
        extended.load_state_dict(model.state_dict())
        labels = torch.zeros(len(inputs[0]), dtype=torch.long, device=inputs[0].device)
        try:
            with backpack(KFAC()), quiet_hooks():
                loss(extended(inputs[0]), labels).backward()
        except RuntimeError as error:  # its hooks forbid in-place operations, and it knows few kinds of layers
            raise NotImplementedError(str(error)) from error
        for p in extended.parameters():
            for factor in p.kfac:  # type: ignore[attr-defined]
                torch.linalg.eigh(factor)

    optimizer.register_step_pre_hook(decompose)
    return optimizer


class TimedTracker(RadiusTracker):
    """Tells how long the power steps of the last batch took, on the device as well."""

    seconds = 0.0

    def _next_vectors(self, seen: Mapping[str, LayerData], steps: int) -> dict[str, Eigenvectors]:
        device = next(self._model.parameters()).device
        synchronize(device)
        start = time.perf_counter()
        vectors = super()._next_vectors(seen, steps)
        synchronize(device)
        self.seconds = time.perf_counter() - start
        return vectors


def with_timed_eigenpairs(share: float) -> Make:
    """Make FlatKFAC that surveys a share of the batch at every step, and times the part that refreshes eigenpairs."""

    def make(model: nn.Module) -> Optimizer:
        optimizer = FlatKFAC(sgd(model), model, every=1, survey_every=1, batch_fraction=share)
        optimizer._tracker.__class__ = TimedTracker
        return optimizer

    return make


def synchronize(device: torch.device) -> None:
    """Wait for all that the device has been told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


ROWS: dict[str, Make] = {
    BARE: sgd,
    BETWEEN: flat(every=NEVER),
    **{name: with_timed_eigenpairs(share) for name, share in EIGENPAIRS.items()},
    "refresh, quarter batch": flat(every=1, survey_every=NEVER, batch_fraction=0.25),
    "survey, quarter batch": flat(every=1, survey_every=1, batch_fraction=0.25),
    "refresh, full batch": flat(every=1, survey_every=NEVER, batch_fraction=1.0),
    "survey, full batch": flat(every=1, survey_every=1, batch_fraction=1.0),
    "refresh by own labels, quarter batch": flat(
        every=1, survey_every=NEVER, batch_fraction=0.25, fisher="empirical", criterion=CRITERION
    ),
    "refresh, sixteenth batch": flat(every=1, survey_every=NEVER, batch_fraction=1 / 16),
    "survey, sixteenth batch": flat(every=1, survey_every=1, batch_fraction=1 / 16),
    "sum over layers, quarter batch": flat(every=1, reduction="sum", batch_fraction=0.25),
    EXACT: flat(every=1, survey_every=1, batch_fraction=1.0, eigenpairs="exact"),
    "SAM": with_sam,
    "Hessian, 10 products": with_hessian,
    "BackPACK's KFAC and eigh": with_factors,
}
PEERS = (EXACT, "Hessian, 10 products", "BackPACK's KFAC and eigh")  # which take many times a step
# Steps from refresh to refresh, refreshes from survey to survey, share of the batch.
SCHEDULES = {
    "default": None,
    "every=1, full batch": (1, 4, "full"),
    "every=1, quarter batch": (1, 4, "quarter"),
    "every=1, sixteenth batch": (1, 4, "sixteenth"),
    **{f"every={every}": (every, 4, "quarter") for every in (4, 8, 16)},
}


def per_step(ratios: Ratios, every: int, survey_every: int, part: str) -> float:
    """Mean cost of a step under a schedule, from the costs of its three kinds of steps."""
    refresh, survey = ratios[f"refresh, {part} batch"], ratios[f"survey, {part} batch"]
    refreshes = (survey + (survey_every - 1) * refresh) / survey_every
    return (refreshes + (every - 1) * ratios[BETWEEN]) / every


def most(memory: Ratios, every: int, survey_every: int, part: str) -> float:
    """Peak memory under a schedule: that of the step which takes the most."""
    kinds = [f"refresh, {part} batch", f"survey, {part} batch", *([BETWEEN] if every > 1 else [])]
    return max(memory[kind] for kind in kinds)


def default_schedule() -> tuple[int, int, str]:
    """Read FlatKFAC's own defaults."""
    defaults = FlatKFAC.__init__.__kwdefaults__
    part = {0.25: "quarter", 1.0: "full"}[defaults["batch_fraction"]]
    return defaults["every"], defaults["survey_every"], part


# ---------------------------------------------------------------- measuring


class Subject:
    """A network in training under one row's optimizer."""

    def __init__(self, model: nn.Module, make: Make, shape: Sequence[int], options: argparse.Namespace) -> None:
        device = torch.device(options.device)
        memory = torch.channels_last if options.channels_last and len(shape) == 3 else torch.contiguous_format
        self.model = model.to(device, memory_format=memory)  # type: ignore[call-overload]
        self.optimizer = make(self.model)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(options.batch_size, *shape, generator=generator)
        self.x: Tensor = x.to(device, memory_format=memory)  # type: ignore[call-overload]
        self.y = torch.randint(10, (options.batch_size,), generator=generator).to(device)
        self.bfloat16 = options.bfloat16

    def step(self) -> None:
        """Make one step as a training loop does."""
        self.optimizer.zero_grad()
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = CRITERION(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()

    def seconds(self) -> float:
        """Time one step, on the device as well."""
        start = time.perf_counter()
        self.step()
        synchronize(self.x.device)
        return time.perf_counter() - start


class EigenpairsSubject(Subject):
    """A network of which only the time that the eigenpairs take is told."""

    def seconds(self) -> float:
        """Time that part of a step."""
        self.step()
        seconds: float = self.optimizer._tracker.seconds  # type: ignore[attr-defined]
        return seconds


def time_ratios(
    network: tuple[nn.Module, tuple[int, ...]],
    rows: Mapping[str, Make],
    options: argparse.Namespace,
    on_round: Callable[[], None],
) -> tuple[float, Ratios]:
    """Return the median seconds of a bare step, and each row's median ratio to the bare step of the same round.

    Rows that cannot train this network are left out, and the exact factors where they are too large.
    """
    model, shape = network
    subjects: dict[str, Subject] = {}
    largest = max(input_dim(module) for module in network[0].modules() if is_layer(module))  # type: ignore[arg-type]
    for name, make in rows.items():
        if name == EXACT and largest > LARGEST:
            continue
        kind = EigenpairsSubject if name in EIGENPAIRS else Subject
        subject = kind(copy.deepcopy(model), make, shape, options)
        with contextlib.suppress(NotImplementedError):  # what BackPACK says of a layer that it does not know
            subject.step()
            subjects[name] = subject
    rounds: list[dict[str, float]] = []
    for number in range(options.repetitions + 1):
        times = {name: subject.seconds() for name, subject in subjects.items()}
        for name in EIGENPAIRS.keys() & times.keys():  # which the pass that reads the layers is no part of
            times[name] += times[BARE]
        if number:  # the first round is for warming up
            rounds.append(times)
        on_round()
    ratios = {name: median(times[name] / times[BARE] for times in rounds) for name in subjects}
    return median(times[BARE] for times in rounds), ratios


def peak_memory(network: str, row: str, options: argparse.Namespace) -> float:
    """Peak memory in MiB of the tensors in a step, those of the network and the optimizer among them.

    It is the third: the first one looks at all layers whatever the row, and makes the optimizer's state.
    """
    gc.collect()  # what earlier rows have left would be counted, or taken off when it goes

    def trained() -> Subject:
        model, shape = NETWORKS[network]()
        subject = Subject(model, ROWS[row], shape, options)
        subject.step()
        subject.step()
        return subject

    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        subject = trained()
        torch.cuda.reset_peak_memory_stats()
        subject.step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with Allocated() as memory:
        subject = trained()
        held = memory.now
        return (held + memory.during(subject.step)) / 2**20


# ---------------------------------------------------------------- what is told


def cost_table(found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Ratios to the bare optimizer, time then memory, a column for each network."""
    table = Table(box=SIMPLE_HEAD, title="Cost of a step relative to bare SGD: time (peak memory)")
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for cells in cost_page.rows(found):
        table.add_row(*cells)
    return table


def with_schedules(ratios: Ratios, combined: Callable[..., float] = per_step) -> Ratios:
    """Add what whole schedules cost."""
    schedules = {name: schedule or default_schedule() for name, schedule in SCHEDULES.items()}
    return {**ratios, **{name: combined(ratios, *schedule) for name, schedule in schedules.items()}}


def measure_networks(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], Table]:
    """Time every row on every network, and take the memory of each."""
    found: dict[str, Any] = {}
    rows = len(rows_of(options)) * options.memory
    with progress(console, len(options.models) * (options.repetitions + 1 + rows)) as advance:
        for name in options.models:
            torch.manual_seed(0)
            seconds, ratios = time_ratios(NETWORKS[name](), rows_of(options), options, advance)
            memory: dict[str, float] = {}
            for row in ratios.keys() - EIGENPAIRS.keys() if options.memory else ():
                memory[row] = peak_memory(name, row, options)
                advance()
            relative = {row: mebibytes / memory[BARE] for row, mebibytes in memory.items()}
            relative = with_schedules(relative, most) if relative else relative
            found[name] = {"seconds": seconds, "time": with_schedules(ratios), "memory": relative}
    return found, cost_table(found)


def measure_sizes(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], Table]:
    """Time a residual network for 16 x 16 images at several widths, or at several batch sizes."""
    sizes = [{"width": width, "batch_size": options.batch_size} for width in options.widths or ()]
    sizes += [{"width": 64, "batch_size": batch_size} for batch_size in options.batch_sizes or ()]
    found: dict[str, Any] = {}
    with progress(console, len(sizes) * (options.repetitions + 1)) as advance:
        for size in sizes:
            torch.manual_seed(0)
            network = CifarNet((size["width"],) * 4), (3, 16, 16)
            given = argparse.Namespace(**{**vars(options), "batch_size": size["batch_size"]})
            seconds, ratios = time_ratios(network, rows_of(options), given, advance)
            name = f"width {size['width']}" if options.widths else f"batch {size['batch_size']}"
            found[name] = {"seconds": seconds, "time": with_schedules(ratios), "memory": {}, **size}
    return found, cost_table(found)


def rows_of(options: argparse.Namespace) -> dict[str, Make]:
    """Rows that are asked for."""
    return {name: make for name, make in ROWS.items() if options.peers or name not in PEERS}


@contextlib.contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """Show how much is done."""
    with progress_bar(console) as bar:
        task = bar.add_task("rounds", total=total)
        yield lambda: bar.advance(task)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    console = begin(options)
    if options.report:
        write_page(options.page, partial(cost_page.lines, cost_page.read_all(options.out)))
        return
    measure = measure_sizes if options.widths or options.batch_sizes else measure_networks
    found, table = measure(options, console)
    console.print(table)
    packages = ("torch", "torchvision", "backpack-for-pytorch")
    about = circumstances(options.command, options.threads, options.device, packages)
    about |= {"batch size": options.batch_size} if not options.batch_sizes else {}
    about |= {"default": "every={}, survey_every={}, on a {} batch".format(*default_schedule())}
    path = options.out / f"{options.name}.json"
    path.write_text(json.dumps({**about, "results": found}, indent=2) + "\n")
    write_tables(path.with_suffix(".txt"), [table], (f"{what}: {value}" for what, value in about.items()))
    console.print(f"Written to {path}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser("step_cost", "Time FlatKFAC's steps beside the bare optimizer's.")
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), help="networks")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--widths", nargs="+", type=int, help="measure a residual network at these widths instead")
    sizes.add_argument("--batch-sizes", nargs="+", type=whole(1), help="measure one at width 64 at these instead")
    parser.add_argument("--batch-size", type=whole(1), default=32, help="examples")
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="measure those that take many steps' time"
    )
    parser.add_argument("--repetitions", type=whole(1), default=15, help="timed steps of each row")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory too")
    parser.add_shared("--threads")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--bfloat16", action="store_true", help="under autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_shared("--out", default=Path("benchmarks/results/step_cost"))
    parser.add_argument("--name", default="cpu", help="of the files there")
    parser.add_argument(
        "--report", action="store_true", help="write the page of all that was measured, and run nothing"
    )
    parser.add_argument("--page", type=Path, default=Path("docs/results/cost.md"), help="which --report writes")
    options = parser.read(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    return options


if __name__ == "__main__":
    main()
