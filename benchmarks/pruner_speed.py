"""How long NeuronPruner takes, and how much of a model it reaches, on torchvision's classifiers.

For each model: seconds of the processor to trace it and find out which neurons go together, and for one cut (those of
the clock are in the JSON file), and what is left. Half of the neurons that can go do so, about the same share of each
layer; torch-pruning, measured beside it, is asked for half of each layer but the classifier. What exactly half of each
layer would leave of the parameters, whoever prunes, stands beside what there really is, and so does what the half with
the most parameters would leave, which is where ``NeuronPruner(per="parameter")`` leads. Each model and each library has
processes and a time limit of its own; the fastest of three tells. After the cut, the model runs in eval mode, where
MACs are counted, and then forward and backward in train mode; an error stands in the column that could not be filled.

``--saliency`` measures instead what it costs to read Theta in training.

Run it with ``python -m benchmarks.pruner_speed`` (``pip install -e ".[benchmark]"``); ``--help`` tells the options.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import kfac_flat
from benchmarks import saliency_cost
from benchmarks.commands import Parser, begin
from benchmarks.records import ROOT, cpu_name, one_line, progress_bar, write_tables
from examples.digits import whole
from examples.torchvision_models import models

OURS, PEER = "kfac-flat", "torch-pruning"
MODELS = (
    "resnet18", "resnet50", "vgg16_bn", "alexnet", "mobilenet_v2", "mobilenet_v3_small", "densenet121",
    "efficientnet_b0", "googlenet", "inception_v3", "regnet_y_400mf", "shufflenet_v2_x1_0", "squeezenet1_0",
    "mnasnet1_0", "resnext50_32x4d", "convnext_tiny", "vit_b_16", "swin_t", "maxvit_t",
)  # fmt: skip
IMAGE_SIZE = {"inception_v3": 299}
COLUMNS = {  # what is known of a cut, and how it is written
    "build_cpu": ("trace\nCPU s", "{:.2f}"),
    "cut_cpu": ("cut\nCPU s", "{:.2f}"),
    "neurons": ("neurons\ngone", "{:.1%}"),
    "reach": ("params\nreached", "{:.1%}"),
    "half": ("params at\n½ of each", "{:.2f}x"),
    "largest": ("params,\nlargest ½", "{:.2f}x"),
    "parameters": ("params\nfewer", "{:.2f}x"),
    "macs": ("MACs\nfewer", "{:.2f}x"),
    "trains": ("trains\non", "yes"),
}
Result = dict[str, Any]


# ---------------------------------------------------------------- cuts


def fastest_cut(library: str, model: str, options: argparse.Namespace) -> Result:
    """Measure a cut several times and return the fastest: what takes longer is the machine's doing.

    That is mostly what the system takes to hand out fresh memory. What fails is not tried again.
    """
    results = [measure_cut(library, model, options)]
    while "error" not in results[-1] and len(results) < options.tries:
        results.append(measure_cut(library, model, options))
    return min(results, key=lambda result: sum(result.get(what, math.inf) for what in ("build_cpu", "cut_cpu")))


def measure_cut(library: str, model: str, options: argparse.Namespace) -> Result:
    """Run one cut in a process of its own; returns what it found out, with ``error`` where it did not end well."""
    size = options.image_size or IMAGE_SIZE.get(model, 224)
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.jsonl"
        told.touch()
        arguments = [library, model, size, options.threads, told]
        error = run([sys.executable, "-m", "benchmarks.one_cut", *map(str, arguments)], options)
        result: Result = {"image_size": size}
        for line in told.read_text().splitlines():
            result |= json.loads(line)
    return result | error


def run(command: Sequence[str], options: argparse.Namespace) -> Result:
    """Run a process to its end or the time limit; returns what went wrong in a word, and in more."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=options.timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"> {options.timeout:g} s"}
    if done.returncode == 0:
        return {}
    message = (done.stderr.strip().splitlines() or [""])[-1]
    word = re.match(r"(?:\w+\.)*(\w+)", message)
    killed = f"signal {-done.returncode}" if done.returncode < 0 else ""
    return {"error": killed or (word[1] if word else "failed"), "message": message}


def cut_table(results: Mapping[str, Mapping[str, Result]], libraries: Sequence[str]) -> Table:
    """Lay out one row per model, the libraries side by side."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\n\nmodel", no_wrap=True)
    for library in libraries:
        for i, (heading, _) in enumerate(COLUMNS.values()):
            table.add_column(f"{library if i == 0 else ''}\n{heading}", justify="right", no_wrap=True)
    for model, by_library in results.items():
        table.add_row(model, *(cell for library in libraries for cell in cells(by_library.get(library, {}))))
    return table


def cells(result: Result) -> list[str]:
    """Write what is known of a cut; the error stands where the first unknown would."""
    written = [form.format(result[what]) if what in result else "" for what, (_, form) in COLUMNS.items()]
    if "error" in result:
        written[written.index("")] = result["error"]
    return written


def failures(results: Mapping[str, Mapping[str, Result]]) -> list[str]:
    """Say in full what went wrong."""
    return [
        f"{model}, {library}: {result['message']}"
        for model, by_library in results.items()
        for library, result in by_library.items()
        if "message" in result
    ]


def measure_cuts(options: argparse.Namespace, console: Console) -> None:
    """Measure all cuts and write them down, after each what is known by then."""
    libraries = [OURS, PEER] if options.peer else [OURS]
    results: dict[str, dict[str, Result]] = {model: {} for model in options.models}
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(libraries) * len(results))
        for model, by_library in results.items():
            for library in libraries:
                progress.update(task, description=f"{model}, {library}")
                by_library[library] = fastest_cut(library, model, options)
                progress.advance(task)
                found = {"timeout_s": options.timeout, "models": results}
                write(options, "cuts", found, cut_table(results, libraries), failures(results))
        progress.update(task, description="done")
    console.print(cut_table(results, libraries))


# ---------------------------------------------------------------- saliency


def measure_saliency(options: argparse.Namespace, console: Console) -> None:
    """Measure what reading Theta costs on each network, and write it down."""
    results: dict[str, dict[str, float]] = {}
    with progress_bar(console) as progress:
        task = progress.add_task("", total=len(saliency_cost.NETWORKS) * (options.repetitions + 1))
        for name, make in saliency_cost.NETWORKS.items():
            progress.update(task, description=name)
            results[name] = saliency_cost.measure(
                make, options.batch_size, options.repetitions, lambda: progress.advance(task)
            )
    found = {"batch_size": options.batch_size, "repetitions": options.repetitions, "seconds": results}
    write(options, "saliency", found, saliency_table(results))
    console.print(saliency_table(results))


def saliency_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """Lay out one row per network."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("network", no_wrap=True)
    headings = ("training step\nCPU ms", "one with reading\nCPU ms", "reading alone\nCPU ms", "any other step\nCPU ms")
    for heading in (*headings, "steps\nread", "cost of\nan epoch", "summing up W, dW\nCPU ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, found in results.items():
        times = {what: f"{1000 * value:,.2f}" for what, value in found.items()}
        share = found["share"]
        cost = (share * found["reading"] + (1 - share) * found["passing"]) / found["step"]
        shown = [times[what] for what in ("step", "watched", "reading", "passing")]
        table.add_row(name, *shown, f"{share:.1%}", f"{cost:.2%}", times["summing"])
    return table


# ---------------------------------------------------------------- the command


def write(
    options: argparse.Namespace, name: str, found: Mapping[str, Any], table: Table, notes: Sequence[str] = ()
) -> None:
    """Write results as JSON and as a table in plain text, with how they were made."""
    about = circumstances(options)
    (options.out / f"{name}.json").write_text(json.dumps(about | found, indent=2) + "\n")
    made = (f"{what}: {one_line(value)}" for what, value in about.items())
    write_tables(options.out / f"{name}.txt", [table], [*notes, *made])


def circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """Say with what, on what and when this was measured."""
    packages = ["torch", "torchvision", *([PEER] if options.peer and not options.saliency else [])]
    versions = {name: metadata.version(name) for name in packages}
    return {
        "command": options.command,
        "versions": {"python": platform.python_version(), OURS: kfac_flat.__version__, **versions},
        "hardware": {"cpu": cpu_name(), "threads": options.threads, "load": round(os.getloadavg()[0], 1)},
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    options = parse(arguments)
    console = begin(options)
    (measure_saliency if options.saliency else measure_cuts)(options, console)
    console.print(f"Written to {options.out}/")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = Parser("pruner_speed", "Time NeuronPruner on torchvision's classifiers, beside torch-pruning.")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help="classifiers of torchvision")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure torch-pruning too")
    parser.add_argument("--tries", type=whole(1), default=3, help="cuts of each, of which the fastest tells")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one model and one library, all in")
    parser.add_argument("--image-size", type=whole(1), help="pixels; 224 and, for inception_v3, 299 unless given")
    parser.add_argument("--saliency", action="store_true", help="measure the recording of Theta instead")
    parser.add_argument("--repetitions", type=whole(1), default=15, help="timed steps with --saliency")
    parser.add_argument("--batch-size", type=whole(1), default=128, help="with --saliency")
    parser.add_shared("--threads")
    parser.add_shared("--out", default=Path("benchmarks/results/pruner_speed"))
    options = parser.read(arguments)
    unknown = sorted(set(options.models) - set(models.list_models(module=models)))
    if unknown:
        parser.error(f"torchvision has no classifier {', '.join(unknown)}")
    if options.timeout <= 0:
        parser.error("--timeout must be more than 0")
    if options.peer and not options.saliency and importlib.util.find_spec("torch_pruning") is None:
        parser.error('torch-pruning is not installed: pip install -e ".[benchmark]", or say --no-peer')
    return options


if __name__ == "__main__":
    main()
