"""The pictures of the idea can be drawn anew, are all shown, and show what is so."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

from docs import pictures
from kfac_flat import spectral_radii

PAGE = (Path(pictures.__file__).parent / "idea.md").read_text("utf-8")


def test_all_pictures_are_drawn_and_shown_with_a_text_in_their_place(tmp_path: Path) -> None:
    drawn = {path.name for path in pictures.main(["--out", str(tmp_path)])}
    assert drawn == {path.name for path in pictures.FOLDER.iterdir()}
    shown = re.findall(
        r"^```\{image\} idea/(\S+)-(\w+)\.svg\n:alt: (.{60,})\n:class: only-(\w+)\n```$", PAGE, re.MULTILINE
    )
    assert {f"{name}-{theme}.svg" for name, theme, _, _ in shown} == drawn
    assert all(theme == on for _, theme, _, on in shown)
    texts = {theme: [alt for _, own, alt, _ in shown if own == theme] for theme in ("light", "dark")}
    assert texts["light"] == texts["dark"]


def test_the_fisher_in_the_picture_is_that_of_softmax_regression() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(20, 3)
    p = model(x).softmax(1).detach()
    of_outputs = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    expected = torch.stack([torch.kron(torch.outer(a, a), G) for a, G in zip(x, of_outputs, strict=True)]).mean(0)
    torch.testing.assert_close(pictures.fisher(model, x), expected)


def test_the_product_in_the_picture_resembles_the_fisher() -> None:
    product, fisher = (pictures.matrices()[name].flatten() for name in ("A ⊗ G", "the Fisher itself"))
    assert torch.cosine_similarity(product, fisher, dim=0) > 0.9


def test_the_networks_in_the_picture_differ_in_rho_and_not_in_loss() -> None:
    x, y = pictures.rings()
    models = [pictures.trained(mu) for mu in (0.0, 0.1)]
    sharp, flat = (max(spectral_radii(model, x, exact=True).values()) for model in models)
    losses = [float(nn.functional.cross_entropy(model(x), y).detach()) for model in models]
    assert flat < 0.6 * sharp
    assert abs(losses[0] - losses[1]) < 0.01


def test_what_is_crossed_out_in_one_layer_is_struck_out_where_it_is_read() -> None:
    made = pictures.cut()
    assert made.outputs["stem"] == made.outputs["b"] == made.inputs["a"] == made.inputs["head"]
    assert made.outputs["a"] == made.inputs["b"]
    assert all(made.inputs["stem"] + made.outputs["head"])
    assert [sum(made.outputs[name]) for name in pictures.LAYERS] == [5, 3, 5, 3]
