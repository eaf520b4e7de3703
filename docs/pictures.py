"""The pictures of ``idea.md``, for light and for dark pages: ``python -m docs.pictures``.

Whatever can be computed is: curvature and neurons are those of small models, read and cut
by the library itself.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Ellipse, FancyArrowPatch, FancyBboxPatch, Rectangle
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_flat import FlatKFAC, NeuronPruner, spectral_radii
from kfac_flat.curvature.kronecker import KroneckerProduct
from kfac_flat.curvature.likelihood import categorical
from kfac_flat.curvature.radius import factors
from kfac_flat.curvature.twin import Twin
from kfac_flat.pruning.picture import COLOURS, FAINT, INK, MUTED

FOLDER = Path(__file__).parent / "idea"


@dataclass(frozen=True)
class Theme:
    """Colours for one kind of page.

    Attributes:
        name: Ends the names of its files.
        ink: Of text and lines.
        muted: Of what matters less.
        faint: Of areas behind.
        page: Of the page itself.
        colours: That stay apart for every kind of colour vision.
    """

    name: str
    ink: str
    muted: str
    faint: str
    page: str
    colours: tuple[str, ...]


LIGHT = Theme("light", INK, MUTED, FAINT, "#ffffff", COLOURS)
DARK = Theme(
    "dark",
    "#e6e6e6",
    "#a3a3a3",
    "#3a3d42",
    "#131416",
    ("#56b4e9", "#f0883e", "#3ecf9b", "#e6a3cc"),
)


# ---------------------------------------------------------------- curvature


def fisher(model: nn.Sequential, x: Tensor) -> Tensor:
    """Form the true Fisher of the first layer's weight, label by label."""
    total = torch.zeros(model[0].weight.numel(), model[0].weight.numel())
    for example in x:
        logs = model(example).log_softmax(0)
        for log in logs:
            (gradient,) = torch.autograd.grad(-log, model[0].weight, retain_graph=True)
            column = gradient.T.flatten()
            total += log.detach().exp() * torch.outer(column, column)
    return total / len(x)


def block(model: nn.Module, layer: str, x: Tensor, draws: int = 200) -> KroneckerProduct:
    """Read A and G of a layer, G as a mean over many draws of random signs."""
    generator, twin = torch.Generator().manual_seed(0), Twin(model, [layer])
    read = [
        factors(
            twin.read(
                (x,),
                {},
                lambda output: categorical(output, generator),
                create_graph=False,
            )[layer]
        )
        for _ in range(draws)
    ]
    A, G = (torch.stack(parts).mean(0)[0] for parts in zip(*read, strict=True))
    return KroneckerProduct(A, G)


@cache
def matrices() -> dict[str, Tensor]:
    """Return the factors of a layer, their product, and the Fisher that it stands for."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(400, 3) @ torch.tensor(
        [[1.2, 0.8, 0.0], [0.0, 0.9, -0.5], [0.0, 0.0, 0.6]]
    )
    read = block(model, "0", x)
    return {
        "A": read.A,
        "G": read.G,
        "A ⊗ G": read.dense(),
        "the Fisher itself": fisher(model, x),
    }


def draw_factors(figure: Figure, theme: Theme) -> None:
    """Draw the matrices by the size of their entries."""
    colours = LinearSegmentedColormap.from_list(
        "", [theme.colours[1], theme.page, theme.colours[0]]
    )
    panels = figure.subplots(1, 4, width_ratios=(3, 4, 8, 8))
    for panel, (title, matrix) in zip(panels, matrices().items(), strict=True):
        largest, size = float(matrix.abs().max()), len(matrix)
        panel.imshow(matrix.numpy(), cmap=colours, vmin=-largest, vmax=largest)
        panel.set_title(f"{title}\n{size} x {size}", color=theme.ink, fontsize=10)
        _bare(panel, theme)


@cache
def trained(mu: float) -> nn.Sequential:
    """Train a small network on the rings, with or without the penalty."""
    x, y = rings()
    torch.manual_seed(3)
    model, criterion = (
        nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)),
        nn.CrossEntropyLoss(),
    )
    inner = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    optimizer = FlatKFAC(inner, model, mu=mu, every=1, survey_every=1, batch_fraction=1)
    for _ in range(400):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return model


def rings() -> tuple[Tensor, Tensor]:
    """Two classes that no straight line parts."""
    generator = torch.Generator().manual_seed(0)
    angles, y = torch.rand(200, generator=generator) * 6.2832, torch.arange(200) % 2
    radii = 0.5 + y + 0.35 * torch.randn(200, generator=generator)
    return torch.stack([radii * angles.cos(), radii * angles.sin()], 1), y


def draw_flatness(figure: Figure, theme: Theme) -> None:
    """Draw the loss around two minima, and the ellipse that K-FAC expects."""
    x, y = rings()
    runs = [("without the penalty", trained(0.0)), ("with the penalty", trained(0.1))]
    steps = torch.linspace(-1.6, 1.6, 61)
    for panel, (title, model) in zip(
        figure.subplots(1, 2, sharex=True, sharey=True), runs, strict=True
    ):
        radii = spectral_radii(model, x, exact=True)
        layer = max(radii, key=radii.__getitem__)
        read = block(model, layer, x)
        values_A, vectors_A = torch.linalg.eigh(read.A)
        values_G, vectors_G = torch.linalg.eigh(read.G)
        top = torch.outer(vectors_G[:, -1], vectors_A[:, -1])
        other = torch.outer(vectors_G[:, -1], vectors_A[:, -2])
        rise = loss_around(model, layer, top, other, steps, x, y)
        curvatures = values_G[-1] * values_A[-1], values_G[-1] * values_A[-2]
        shades = LinearSegmentedColormap.from_list("", [theme.page, theme.colours[0]])
        levels = [0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6]
        panel.contourf(
            steps, steps, rise, levels=[-1, *levels, 99], cmap=shades, vmin=0, vmax=1.6
        )
        panel.contour(
            steps, steps, rise, levels=levels, colors=theme.muted, linewidths=0.6
        )
        width, height = (2 * float((2 * 0.1 / c).sqrt()) for c in curvatures)
        panel.add_patch(
            Ellipse((0, 0), width, height, fill=False, edgecolor=theme.colours[1], lw=2.2)
        )
        panel.plot(0, 0, "o", color=theme.ink, ms=4)
        loss = float(F.cross_entropy(model(x), y).detach())
        panel.set_title(
            f"{title}: rho {radii[layer]:.2f}, loss {loss:.2f}",
            color=theme.ink,
            fontsize=10,
        )
        panel.set_xlabel("along the top eigenvector", color=theme.ink)
        _bare(panel, theme)
        panel.set_aspect("equal")
    figure.axes[0].set_ylabel("along another direction", color=theme.ink)


def loss_around(
    model: nn.Module,
    layer: str,
    right: Tensor,
    up: Tensor,
    steps: Tensor,
    x: Tensor,
    y: Tensor,
) -> list[list[float]]:
    """Return how the loss rises when a layer's weight moves in a plane, row by row."""
    moved = copy.deepcopy(model)
    weight = moved.get_submodule(layer).weight
    with torch.no_grad():
        start, here = weight.clone(), float(F.cross_entropy(moved(x), y))
        rows = []
        for b in steps:
            rows.append([])
            for a in steps:
                weight.copy_(start + a * right + b * up)
                rows[-1].append(float(F.cross_entropy(moved(x), y)) - here)
    return rows


# ---------------------------------------------------------------- a cut


class Residual(nn.Module):
    """Two layers around which the input is added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Linear(4, 8),
            nn.Linear(8, 6),
            nn.Linear(6, 8),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Go around the block as well as through it."""
        x = F.relu(self.stem(x))
        return self.head(F.relu(x + self.b(F.relu(self.a(x)))))


LAYERS = ("stem", "a", "b", "head")


@dataclass(frozen=True)
class Cut:
    """What a removal has taken from the residual network.

    Attributes:
        weights: Of the dense layers, by name.
        inputs: Whether each input of a layer has stayed.
        outputs: Whether each output of a layer has stayed.
    """

    weights: dict[str, Tensor]
    inputs: dict[str, list[bool]]
    outputs: dict[str, list[bool]]


@cache
def cut() -> Cut:
    """Train the residual network a little, and take two fifths of its neurons."""
    torch.manual_seed(4)
    model, x = Residual(), torch.randn(64, 4)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = NeuronPruner(
        model, optimizer, x[:1], target=0.4, max_share=0.5, start=1, events=1
    )
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in LAYERS}
    pruner.step()
    kept = pruner.state_dict()["layers"]
    inputs, outputs = (
        {
            name: [i in kept[name][side] for i in range(weights[name].shape[axis])]
            for name in LAYERS
        }
        for side, axis in (("in", 1), ("out", 0))
    )
    return Cut(weights, inputs, outputs)


def draw_group(figure: Figure, theme: Theme) -> None:
    """Draw neurons as dots, tied ones in one colour, those that went crossed out."""
    made, axes = cut(), figure.subplots()
    through, around = theme.colours[1], theme.colours[0]
    columns = [
        ("input", 0.0, [True] * 4, theme.muted),
        ("stem", 2.2, made.outputs["stem"], around),
        ("a", 4.6, made.outputs["a"], through),
        ("b", 7.0, made.outputs["b"], around),
        ("stem + b", 8.8, made.outputs["b"], around),
        ("head", 11.0, made.outputs["head"], theme.muted),
    ]
    places = {
        name: [(x, (len(stays) - 1) / 2 - i) for i in range(len(stays))]
        for name, x, stays, _ in columns
    }
    for left, right in (
        ("input", "stem"),
        ("stem", "a"),
        ("a", "b"),
        ("stem + b", "head"),
    ):
        stays = {name: stay for name, _, stay, _ in columns}
        for start, from_stays in zip(places[left], stays[left], strict=True):
            for end, to_stays in zip(places[right], stays[right], strict=True):
                if from_stays and to_stays:
                    axes.plot(
                        *zip(start, end, strict=True), color=theme.faint, lw=0.8, zorder=0
                    )
    for start, end, stays in zip(
        places["stem"], places["stem + b"], made.outputs["stem"], strict=True
    ):
        style = (
            {"color": around, "lw": 1.1, "alpha": 0.8}
            if stays
            else {"color": theme.faint, "lw": 0.8, "ls": ":"}
        )
        axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                connectionstyle="arc3,rad=-0.3",
                arrowstyle="-",
                zorder=0,
                **style,
            )
        )
    for start, end, stays in zip(
        places["b"], places["stem + b"], made.outputs["b"], strict=True
    ):
        axes.plot(
            *zip(start, end, strict=True),
            color=around if stays else theme.faint,
            lw=1.6,
            zorder=0,
        )
    for name, x, stays, colour in columns:
        for place, stay in zip(places[name], stays, strict=True):
            axes.add_patch(
                Circle(place, 0.27, fc=colour if stay else theme.page, ec=colour, lw=1.4)
            )
            if not stay:
                axes.plot(*place, "x", color=colour, ms=7, mew=1.6)
        axes.text(x, -4.6, name, ha="center", color=theme.ink, fontsize=11)
        width = f"{len(stays)} → {sum(stays)}" if not all(stays) else f"{len(stays)}"
        axes.text(x, -5.25, width, ha="center", color=theme.muted, fontsize=10)
    axes.set_xlim(-0.5, 11.5)
    axes.set_ylim(-5.5, 4.9)
    axes.set_aspect("equal")
    axes.axis("off")


def draw_weights(figure: Figure, theme: Theme) -> None:
    """The layers' weights as grids, rows and columns that vanish struck out."""
    made = cut()
    panels = figure.subplots(
        1, len(LAYERS), width_ratios=[made.weights[name].shape[1] for name in LAYERS]
    )
    for axes, name in zip(panels, LAYERS, strict=True):
        rows, columns = made.weights[name].shape
        for o, keeps_row in enumerate(made.outputs[name]):
            for i, keeps_column in enumerate(made.inputs[name]):
                stays = keeps_row and keeps_column
                colour = (
                    theme.muted
                    if stays
                    else theme.colours[1]
                    if not keeps_row
                    else theme.colours[0]
                )
                strength = 1 if stays else 0.4
                axes.add_patch(
                    Rectangle(
                        (i + 0.06, o + 0.06),
                        0.88,
                        0.88,
                        color=colour,
                        alpha=strength,
                        lw=0,
                    )
                )
        left = f"{sum(made.outputs[name])} x {sum(made.inputs[name])}"
        axes.set_title(
            f"{name}\n{rows} x {columns} → {left}", color=theme.ink, fontsize=10
        )
        axes.set_xlim(0, columns)
        axes.set_ylim(8, 0)
        axes.set_aspect("equal")
        axes.axis("off")
    for text, colour, x in (
        ("rows of neurons that go", theme.colours[1], 0.2),
        ("columns that read them", theme.colours[0], 0.5),
        ("what stays", theme.muted, 0.8),
    ):
        figure.text(x, 0.03, f"■ {text}", color=colour, ha="center", fontsize=10)


# ---------------------------------------------------------------- the twin


def draw_twin(figure: Figure, theme: Theme) -> None:
    """Two models around one set of parameters, and who does what in a step."""
    axes = figure.subplots()
    own, extra, shared = theme.colours[:3]
    boxes = [
        (
            (0, 2.4, 3.1, 1.9),
            own,
            [
                "your model",
                "compiled or not",
                "a hook notes its input",
                "buffers never touched",
            ],
        ),
        (
            (8.2, 2.4, 3.1, 1.9),
            extra,
            [
                "the twin",
                "same modules, no hooks",
                "buffers of its own",
                "read by BackPACK",
            ],
        ),
        ((4.3, 3.0, 2.7, 1.0), shared, ["Parameters", "the very same objects"]),
        ((4.3, 0.1, 2.7, 1.4), shared, ["p.grad", "of the loss", "+ of the penalty"]),
    ]
    for (x, y, width, height), colour, lines in boxes:
        shape = {
            "boxstyle": "round,pad=0.02,rounding_size=0.12",
            "fc": theme.page,
            "ec": colour,
            "lw": 1.8,
        }
        axes.add_patch(FancyBboxPatch((x, y), width, height, **shape))
        for i, line in enumerate(lines):
            _write(
                axes,
                theme,
                (x + width / 2, y + height - 0.34 - 0.36 * i),
                line,
                bold=i == 0,
            )
    arrows = [
        ((4.28, 3.5), (3.15, 3.5), shared, "<|-|>"),
        ((7.02, 3.5), (8.15, 3.5), shared, "<|-|>"),
        ((1.5, 2.35), (4.25, 0.95), own, "-|>"),
        ((9.8, 2.35), (7.05, 0.95), extra, "-|>"),
    ]
    for start, end, colour, style in arrows:
        axes.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle=style, mutation_scale=12, color=colour, lw=1.6
            )
        )
    over = {
        "connectionstyle": "arc3,rad=-0.13",
        "arrowstyle": "-|>",
        "mutation_scale": 12,
        "ls": "--",
    }
    axes.add_patch(
        FancyArrowPatch((1.6, 4.35), (9.7, 4.35), color=theme.muted, lw=1.4, **over)
    )
    _write(axes, theme, (1.75, 1.1), "loss.backward()\nat every step")
    _write(axes, theme, (9.6, 1.1), "gradient of rho\nevery few steps")
    _write(axes, theme, (5.65, 5.25), "the last batch, its randomness and precision")
    _write(axes, theme, (5.65, -0.3), "the wrapped optimizer steps on the sum")
    axes.set_xlim(-0.2, 11.5)
    axes.set_ylim(-0.6, 5.6)
    axes.set_aspect("equal")
    axes.axis("off")


def _write(
    axes: Axes, theme: Theme, at: tuple[float, float], words: str, *, bold: bool = False
) -> None:
    weight = "bold" if bold else "normal"
    axes.text(
        *at,
        words,
        ha="center",
        va="center",
        color=theme.ink,
        fontsize=9.5,
        fontweight=weight,
    )


# ---------------------------------------------------------------- all of them

PICTURES: dict[str, tuple[Callable[[Figure, Theme], None], tuple[float, float]]] = {
    "factors": (draw_factors, (9.0, 3.0)),
    "flatness": (draw_flatness, (8.0, 4.2)),
    "group": (draw_group, (8.0, 7.0)),
    "weights": (draw_weights, (8.0, 3.4)),
    "twin": (draw_twin, (8.6, 4.6)),
}


def _bare(axes: Axes, theme: Theme) -> None:
    """Leave no more than the frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(theme.muted)


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Draw all pictures and return their paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="where to (default: %(default)s)"
    )
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, (draw, size) in PICTURES.items():
        for theme in (LIGHT, DARK):
            with matplotlib.rc_context(
                {"svg.hashsalt": name}
            ):  # the same file every time
                figure = Figure(figsize=size, layout="constrained")
                draw(figure, theme)
                path = out / f"{name}-{theme.name}.svg"
                figure.savefig(
                    path, transparent=True, metadata={"Date": None, "Creator": None}
                )
            written.append(path)
    return written


if __name__ == "__main__":
    main()
