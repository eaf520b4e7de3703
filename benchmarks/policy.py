"""Which way of choosing neurons keeps most accuracy: NeuronPruner's options compared, one change at a time.

Every run trains a network from scratch and removes most of its neurons on the way. With the same seed, all policies
start from the same weights, see the same batches and make their last removal at the end of the same epoch. Two tasks:
``digits``, network, data and recipe of :mod:`examples.digits`, each epoch over half of the images, drawn anew; and
``cifar``, a residual network of four blocks on 10,000 training and 2,000 test images of CIFAR-10 at 16 x 16 pixels,
each epoch over a quarter of them.

A policy is written as what differs from the plain one, which takes five equal steps, lets all layers compete and counts
scores per neuron: ``plain``, ``pace=cubic``, ``normalize=l2+per=mac``. With ``FlatKFAC`` among its parts, the optimizer
has that penalty at its default weight. ``events=10`` makes the removals smaller and more frequent over the same epochs.
Level 0 is the dense network.

Each run adds a line to ``runs.jsonl``; runs that are there already are not repeated, so the command can be stopped and
given again. Run it with ``python -m benchmarks.policy`` (``pip install -e ".[benchmark,examples]"``); ``--help`` tells
the options.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

import kfac_flat
from benchmarks.pruner_speed import ROOT, cpu_name, progress_bar
from benchmarks.torchvision_models import datasets
from examples import digits
from examples.digits import DigitsNet, Images, ResidualBlock, accuracy, dense_size
from kfac_flat import FlatKFAC, NeuronPruner

Record = dict[str, Any]

# ---------------------------------------------------------------- policies

PLAIN, FLAT = "plain", "FlatKFAC"
READ: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("pace", "ranking", "normalize", "per"), str),
    "events": int,
    "max_share": float,
}
POLICIES = (
    PLAIN,
    "pace=cubic",
    "events=10",
    "normalize=mean",
    "normalize=max",
    "normalize=l2",
    "per=group",
    "per=mac",
    "per=parameter",
    "ranking=layer",
    "max_share=0.95",
    "pace=cubic+events=10",
    "pace=cubic+ranking=layer",
    "pace=cubic+events=10+ranking=layer",
)


@dataclass(frozen=True)
class Policy:
    """What differs from the plain policy; ``flat`` says whether the optimizer is FlatKFAC."""

    name: str
    flat: bool
    options: dict[str, Any]

    @classmethod
    def read(cls, name: str) -> Policy:
        """Read a policy such as ``FlatKFAC+pace=cubic``.

        Raises:
            ValueError: if there is no such option, or its value cannot be read.
        """
        parts = [] if name == PLAIN else name.split("+")
        options: dict[str, Any] = {"pace": "linear"}
        for part in parts:
            option, _, value = part.partition("=")
            if option in READ:
                options[option] = READ[option](value)
            elif part != FLAT:
                raise ValueError(f"{part} is neither {FLAT} nor one of {', '.join(READ)} with a value")
        return cls(name, FLAT in parts, options)

    @property
    def reference(self) -> str:
        """The policy that it is compared with: the plain one under the same optimizer."""
        return FLAT if self.flat else PLAIN

    def schedule(self, epochs: int, last: int) -> dict[str, int]:
        """Place the removals such that the last comes at the end of epoch ``last``, as many as fit before it."""
        events = self.options.get("events", 5)
        every = max(1, 10 // events)
        fitting = min(events, (last - 1) // every + 1)
        return {"start": last - (fitting - 1) * every, "every": every, "events": fitting}


# ---------------------------------------------------------------- tasks


class CifarNet(nn.Module):
    """A residual network for 16 x 16 images: blocks of one, one, two and four times the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = (width, width, width, 2 * width, 4 * width)
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*(ResidualBlock(i, o, stride=1 if i == o else 2) for i, o in pairwise(widths)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``[N, 3, 16, 16]`` to logits ``[N, 10]``."""
        x = self.relu(self.norm(self.stem(x)))
        return self.head(self.pool(self.blocks(x)).flatten(1))


def load_cifar(root: Path | None) -> tuple[Images, Images]:
    """Return the first 10,000 training and 2,000 test images of CIFAR-10, each pixel the mean of four."""
    if root is None:
        raise SystemExit("the task cifar needs --data-root, the folder with cifar-10-batches-py/")
    return _cifar_part(root, True, 10_000), _cifar_part(root, False, 2_000)


def _cifar_part(root: Path, train: bool, count: int) -> Images:
    data = datasets.CIFAR10(root, train=train)
    images = torch.from_numpy(data.data[:count]).movedim(3, 1).float() / 255
    small = nn.functional.avg_pool2d(images, 2).contiguous(memory_format=torch.channels_last)  # a little faster
    return Images(small, torch.tensor(data.targets[:count]))


@dataclass(frozen=True)
class Task:
    """What is trained, how long, and when the last removal comes; ``seen`` is the share of the images in an epoch."""

    load: Callable[[Path | None], tuple[Images, Images]]
    network: Callable[[int], nn.Module]
    width: int
    epochs: int
    last: int
    batch_size: int
    seen: float = 1.0

    def last_removal(self, epochs: int) -> int:
        """Return the epoch of the last removal in a training of another length."""
        return max(1, round(epochs * self.last / self.epochs))


TASKS = {
    "digits": Task(lambda _: digits.load_data("cpu"), DigitsNet, width=32, epochs=24, last=13, batch_size=64, seen=0.5),
    "cifar": Task(load_cifar, CifarNet, width=16, epochs=18, last=11, batch_size=128, seen=0.25),
}


# ---------------------------------------------------------------- one run


def run(
    task: Task, policy: Policy, level: float, seed: int, epochs: int, train_set: Images, test_set: Images
) -> Record:
    """Train one network, remove a share ``level`` of its neurons on the way, and say what came of it."""
    torch.manual_seed(seed)
    shuffle = torch.Generator().manual_seed(seed)
    model, example = task.network(task.width), train_set.images[:1]
    settings = digits.Settings()
    optimizer: Optimizer = SGD(model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4)
    if policy.flat:
        optimizer = FlatKFAC(optimizer, model)
    pruner = None
    if level:
        options = policy.options | policy.schedule(epochs, task.last_removal(epochs))
        pruner = NeuronPruner(model, optimizer, example, target=level, **options)
    batches = int(task.seen * len(train_set.labels)) // task.batch_size
    schedule = OneCycleLR(optimizer, settings.lr, epochs=epochs, steps_per_epoch=batches)

    start = time.perf_counter()
    for _ in range(epochs):
        model.train()
        for images, labels in islice(train_set.batches(task.batch_size, shuffle), batches):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
        if pruner:
            pruner.step()
    size = pruner.size if pruner else dense_size(model, example)[0]
    seconds = time.perf_counter() - start
    return {
        "accuracy": accuracy(model, test_set),
        "seconds": round(seconds, 2),
        **{name: value for name, value in asdict(size).items() if value is not None},
    }


# ---------------------------------------------------------------- all runs


def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two runs the same run."""
    return tuple(record[name] for name in ("task", "policy", "level", "seed", "epochs"))


def read_runs(path: Path) -> list[Record]:
    """Read the runs that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def planned(options: argparse.Namespace) -> Iterator[Record]:
    """Name the runs asked for, seeds outermost: whenever they are stopped, what is there can be compared."""
    for seed in options.seeds:
        for name in options.tasks:
            for level in options.levels:
                for policy in options.policies if level else [PLAIN]:
                    epochs = options.epochs or TASKS[name].epochs
                    yield {"task": name, "policy": policy, "level": level, "seed": seed, "epochs": epochs}


def circumstances(options: argparse.Namespace) -> Record:
    """Say with what, on what and when this is measured."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    revision = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": options.command,
        "revision": revision or "unknown",
        "versions": {
            "python": platform.python_version(),
            "kfac-flat": kfac_flat.__version__,
            "torch": metadata.version("torch"),
        },
        "hardware": cpu_name(),
        "threads": options.threads,
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def run_all(options: argparse.Namespace, console: Console) -> None:
    """Make the runs that are missing, each written down when it is done."""
    there = {identity(record) for record in read_runs(options.runs)}
    missing = [record for record in planned(options) if identity(record) not in there]
    data = cache(lambda name: TASKS[name].load(options.data_root))
    about = circumstances(options)
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=len(missing))
        for record in missing:
            label = " ".join(str(record[name]) for name in ("task", "level", "seed", "policy"))
            progress.update(bar, description=label)
            task, policy = TASKS[record["task"]], Policy.read(record["policy"])
            found = run(task, policy, record["level"], record["seed"], record["epochs"], *data(record["task"]))
            with options.runs.open("a") as file:
                file.write(json.dumps(record | found | about) + "\n")
            progress.advance(bar)
            if not console.is_terminal:
                console.print(f"{label}: {found['accuracy']:.2f} %, {found['seconds']:.1f} s", soft_wrap=True)


# ---------------------------------------------------------------- the report


def by_seed(records: Iterable[Record], **wanted: Any) -> dict[int, Record]:
    """Return the runs that are as wanted, by seed."""
    return {r["seed"]: r for r in records if all(r[name] == value for name, value in wanted.items())}


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """Write mean and standard deviation; one value has no deviation."""
    written = form.format(mean(values))
    return f"{written} ± {form.format(stdev(values)).lstrip('+')}" if len(values) > 1 else written


def standard_errors(differences: Sequence[float]) -> str:
    """Write by how many standard errors the mean differs from zero; nothing where that cannot be told."""
    if len(differences) < 2 or not stdev(differences):
        return ""
    return f"{mean(differences) / (stdev(differences) / len(differences) ** 0.5):+.1f}"


def tables(records: Sequence[Record]) -> Iterator[Table]:
    """Lay out one table per task, level and length of training, one row per policy."""
    for name, level, epochs in dict.fromkeys((r["task"], r["level"], r["epochs"]) for r in records):
        own = [r for r in records if (r["task"], r["level"], r["epochs"]) == (name, level, epochs)]
        removed = f"{level:.0%} of the neurons removed" if level else "dense"
        table = Table(box=SIMPLE_HEAD, title=f"{name}, {removed}, {epochs} epochs", title_justify="left")
        table.add_column("policy", no_wrap=True)
        for heading in ("accuracy %", "minus plain", "std. errors", "seeds", "neurons", "parameters", "MACs"):
            table.add_column(heading, justify="right", no_wrap=True)
        for policy in dict.fromkeys(r["policy"] for r in own):
            table.add_row(*row(own, policy))
        yield table


def row(records: Sequence[Record], policy: str) -> list[str]:
    """Write what is known of a policy; differences are taken seed by seed."""
    runs, reference = by_seed(records, policy=policy), Policy.read(policy).reference
    others = {} if policy == reference else by_seed(records, policy=reference)
    differences = [runs[s]["accuracy"] - others[s]["accuracy"] for s in sorted(runs.keys() & others.keys())]
    sizes = [f"{mean(r[what] for r in runs.values()):,.0f}" for what in ("neurons", "parameters", "macs")]
    compared = [spread(differences, "{:+.2f}"), standard_errors(differences)] if differences else ["", ""]
    return [policy, spread([r["accuracy"] for r in runs.values()]), *compared, str(len(runs)), *sizes]


def report(options: argparse.Namespace, console: Console) -> None:
    """Print and write the tables of all runs that are there, with how these were made."""
    records = read_runs(options.runs)
    if not records:
        raise SystemExit(f"{options.runs} holds no runs yet")
    with (options.out / "table.txt").open("w") as file:
        for target in (console, Console(file=file, width=160)):
            for table in tables(records):
                target.print(table)
            for line in notes(records):
                target.print(line, soft_wrap=True, highlight=False, markup=False)


def notes(records: Sequence[Record]) -> Iterator[str]:
    """Say how the numbers are to be read, and how they were made."""
    yield "accuracy after the last epoch, mean ± standard deviation over seeds; minus plain: paired by seed, against"
    yield "the plain policy under the same optimizer; std. errors: that difference over its standard error"
    yield from origins(records)


def origins(records: Sequence[Record]) -> Iterator[str]:
    """Say how the numbers were made."""
    for what in ("command", "revision", "versions", "hardware", "threads"):
        values = dict.fromkeys(_plain(r[what]) for r in records)
        yield f"{what}: {'; '.join(values)}"
    yield f"{len(records)} runs, {sum(r['seconds'] for r in records):,.0f} s of training"


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    if not options.report:
        run_all(options, console)
    report(options, console)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policy",
        description="Compare NeuronPruner's options by the accuracy that is left, one change at a time.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to train on")
    parser.add_argument("--levels", nargs="+", type=_level, default=[0.75, 0.9], metavar="SHARE", help="neurons to go")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)), metavar="SEED", help="repetitions")
    parser.add_argument("--policies", nargs="+", type=_policy, default=POLICIES, metavar="POLICY", help="see above")
    parser.add_argument("--epochs", type=digits.whole(1), help="of training; each task has its own unless given")
    parser.add_argument("--data-root", type=Path, help="folder with cifar-10-batches-py/, as torchvision reads it")
    parser.add_argument("--threads", type=digits.whole(1), default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/policy"), help="folder for results")
    parser.add_argument("--report", action="store_true", help="lay out the runs that are there, and run nothing")
    options = parser.parse_args(arguments)
    options.runs = options.out / "runs.jsonl"
    options.command = f"{parser.prog} {shlex.join(sys.argv[1:] if arguments is None else arguments)}".rstrip()
    return options


def _policy(text: str) -> str:
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    try:
        NeuronPruner(model, SGD(model.parameters()), torch.ones(1, 2), target=0.5, **Policy.read(text).options)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _level(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 0 and less than 1")
    return value


if __name__ == "__main__":
    main()
