"""Settings of the site, which ``python -m sphinx -W docs docs/_build`` builds offline."""

from __future__ import annotations

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import kfac_flat

project = "kfac-flat"
author = "the authors of kfac-flat"
version = release = kfac_flat.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = (
    3  # so that [text](page.md#heading) works, as in a repository's view
)

autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autodoc_mock_imports = ["accelerate", "lightning", "transformers"]
# Names of other projects, to be fetched if they were to be linked, and aliases of types.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(torch|nn|collections|typing|os|pathlib|accelerate|lightning|transformers)\..*",
    ),
    ("py:class", "Tensor|Optimizer|Schedule|Likelihood|Target|Rule|Trainer"),
]

html_theme = "furo"
html_title = f"kfac-flat {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = (
    "mathml"  # browsers read it without the script that Sphinx would fetch
)
copybutton_exclude = ".linenos, .gp, .go"  # of a console, what is typed
copybutton_selector = "div:not(.highlight-output) > div.highlight > pre"
pygments_style = "friendly"
pygments_dark_style = "github-dark"


def _formula(translator: HTML5Translator, node: nodes.Element) -> None:
    translator.body.append(latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def _displayed_formula(translator: HTML5Translator, node: nodes.Element) -> None:
    formula = latex2mathml.tex2mathml(node.astext()).replace(
        "<math ", '<math display="block" ', 1
    )
    translator.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Let formulas be written as MathML."""
    app.add_html_math_renderer("mathml", (_formula, None), (_displayed_formula, None))
