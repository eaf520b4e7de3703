"""The command line: what could be pruned of a model of one's own, before anything is trained."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import inspect
import os
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kfac_flat.pruning.errors import CutError
from kfac_flat.pruning.inspection import inspect as inspected
from kfac_flat.pruning.inspection_page import write_inspection

_EXAMPLES = """\
examples:
  kfac-flat inspect torchvision.models:resnet18 --input 1,3,224,224
  kfac-flat inspect "mypackage.models:Net(width=32)" --input 1,1,28,28 --target 0.5 --html net.html
  kfac-flat inspect mypackage.models:build --input tokens=1,16:int64 --input mask=1,16:bool
"""
_INPUT = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:,\d+)*)(?::(?P<dtype>\w+))?")


class UsageError(ValueError):
    """What was asked for cannot be done; the message tells what to write instead."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


# ---------------------------------------------------------------- the command


def main(arguments: Sequence[str] | None = None, prog: str = "kfac-flat") -> None:
    """Run the command line; exits with code 2 and one line where it cannot do what it is asked to."""
    parser, options = _parse(arguments, prog)
    try:
        inputs = example_inputs(options.input)
        model = load_model(options.model)
    except UsageError as error:
        parser.error(str(error))
    try:
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            found = inspected(model, inputs, options.target)
    except (ValueError, TypeError, CutError) as error:
        parser.error(f"{options.model} with {_written(options.input)}: {error}")
    for note in notes:
        print(f"note: {note.message}", file=sys.stderr)
    print(f"{options.model}, called with {_written(options.input)}\n")
    print(found.table(shutil.get_terminal_size((100, 24)).columns))
    if options.html:
        print(f"\nWritten to {write_inspection(found, options.html, f'What can be pruned of {options.model}')}")


def _parse(arguments: Sequence[str] | None, prog: str) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the options; returns the parser of the subcommand as well, for its errors."""
    parser = _Parser(prog=prog, description="Make PyTorch networks smaller while they train.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    inspect_ = commands.add_parser(
        "inspect",
        help="tell what could be pruned of a model",
        description="Tell what could be pruned of a model: its layers, which channels go together, parameters and "
        "multiply-accumulates (MACs), what is frozen and why. Nothing is trained or changed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect_.add_argument(
        "model", metavar="MODULE:FACTORY", help="a model, or a class or function that makes one; arguments may follow"
    )
    inspect_.add_argument(
        "--input", metavar="[NAME=]SHAPE[:DTYPE]", action="append", required=True,
        help="what the model is called with, the batch first, such as 1,3,224,224 or ids=1,16:int64; once for each "
        "argument, all by position or all by name (float32 unless said)",
    )  # fmt: skip
    inspect_.add_argument(
        "--target", metavar="SHARE", type=_share, help="show an even cut of this share of the neurons, such as 0.5"
    )
    inspect_.add_argument("--html", metavar="FILE", type=_new_file, help="write a page to look at in a browser, too")
    return inspect_, parser.parse_args(arguments)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a number between 0 and 1, such as 0.5")
    return share


def _new_file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file in it, such as {path / 'model.html'}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}: make it first")
    return path


# ---------------------------------------------------------------- what the model is called with


def example_inputs(texts: Sequence[str]) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Make the tensors that are described, zeros all.

    Raises:
        UsageError: if a description cannot be read, or some have names and others have not.

    Example:
        >>> [x.shape for x in example_inputs(["1,3,8,8", "1,4:int64"])]
        [torch.Size([1, 3, 8, 8]), torch.Size([1, 4])]
        >>> example_inputs(["ids=1,2:int64"])
        {'ids': tensor([[0, 0]])}
    """
    named = [_named_tensor(text) for text in texts]
    names = [name for name, _ in named if name is not None]
    if not names:
        return tuple(tensor for _, tensor in named)
    if len(names) < len(named):
        raise UsageError("--input: give all inputs by position or all by name, such as --input ids=1,16:int64")
    if len(set(names)) < len(names):
        raise UsageError(f"--input: {next(n for n in names if names.count(n) > 1)} is given twice")
    return {name: tensor for name, tensor in named if name is not None}


def _named_tensor(text: str) -> tuple[str | None, Tensor]:
    match = _INPUT.fullmatch(text.replace(" ", ""))
    shape = [int(size) for size in match["shape"].split(",")] if match else []
    if match is None or 0 in shape:
        raise UsageError(
            f"--input {text}: write the sizes of the tensor, whole numbers from 1 with commas between them, such as "
            "1,3,224,224 or 1,16:int64"
        )
    dtype = getattr(torch, match["dtype"] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"--input {text}: torch has no dtype {match['dtype']}; say float32, float16, int64 or bool")
    return match["name"], torch.zeros(shape, dtype=dtype)


def _written(texts: Sequence[str]) -> str:
    return " ".join(f"--input {text}" for text in texts)


# ---------------------------------------------------------------- the model


def load_model(text: str) -> nn.Module:
    """Import a model, or import what makes one and call it.

    Args:
        text: ``module:name``, or ``module:name(argument, name=argument)`` with literals for arguments; the name may
            have dots.

    Raises:
        UsageError: if there is no such model.

    Example:
        >>> load_model("torch.nn:Linear(3, 2, bias=False)")
        Linear(in_features=3, out_features=2, bias=False)
    """
    module, colon, expression = text.partition(":")
    if module.endswith(".py") or "/" in module or "\\" in module:
        raise UsageError(
            f"{module} is a file: name the module as in an import, such as {_module_of(module)}:{expression or 'build'}"
        )
    if not colon or not all(part.isidentifier() for part in module.split(".")):
        raise UsageError(f"{text} must be MODULE:FACTORY, such as torchvision.models:resnet18")
    name, args, kwargs = _call(text, expression)
    found = _attribute(_imported(module), module, name)
    if isinstance(found, nn.Module):
        if args is not None:
            raise UsageError(f"{module}:{name} is a model already: leave the arguments away")
        return found
    if not callable(found):
        raise UsageError(
            f"{module}:{name} is of type {type(found).__name__}: name a model, or a class or function of one"
        )
    _check_arguments(f"{module}:{name}", found, args or [], kwargs)
    model = found(*(args or []), **kwargs)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{text} gives an object of type {type(model).__name__}: name a function that returns a torch.nn.Module"
        )
    return model


def _module_of(file: str) -> str:
    return re.sub(r"[/\\]+", ".", file.removesuffix(".py").lstrip("./\\")) or "mypackage.models"


def _call(text: str, expression: str) -> tuple[str, list[Any] | None, dict[str, Any]]:
    """Take a call apart: what is called, by its name, and the arguments; None where it is no call."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        called = tree.func if isinstance(tree, ast.Call) else tree
        args = [ast.literal_eval(a) for a in tree.args] if isinstance(tree, ast.Call) else None
        keywords = tree.keywords if isinstance(tree, ast.Call) else []
        kwargs = {k.arg: ast.literal_eval(k.value) for k in keywords if k.arg is not None}
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"{text}: behind the colon stands a name, and perhaps arguments that are plain values, such as "
            "mypackage.models:Net(width=32)"
        ) from error
    name = ast.unparse(called)
    if not all(part.isidentifier() for part in name.split(".")) or len(kwargs) < len(keywords):
        raise UsageError(f"{text}: {expression} must be a name, or a name and arguments, such as Net(width=32)")
    return name, args, kwargs


def _imported(name: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:  # as it is for python -m
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"there is no module {error.name} here: run this in the folder that holds it, or install it"
            ) from error
        raise UsageError(f"{name} cannot be imported: it needs {error.name}, which is not installed") from error


def _attribute(module: Any, module_name: str, name: str) -> Any:
    found, path = module, module_name
    for part in name.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, [name for name in dir(found) if not name.startswith("_")], 1)
            hint = f"; did you mean {close[0]}?" if close else ": name a model, or a class or function of one"
            raise UsageError(f"{path} has no {part}{hint}")
        found, path = getattr(found, part), f"{path}.{part}"
    return found


def _check_arguments(name: str, factory: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # what is not written in Python may have none
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(
            f"{name} does not take these arguments ({error}): write them behind it, in quotes for the shell, such as "
            f'"{name}(10)", or name a function that needs none'
        ) from error
