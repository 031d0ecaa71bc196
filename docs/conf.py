"""Sphinx's settings: ``make docs`` builds these pages, without a network; warnings are errors."""

import sys
import warnings
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # our extension, and the package in this checkout
warnings.filterwarnings("ignore", category=FutureWarning)  # of anomalib's own imports of all its models

project = "anomalib-csflow"
author = "the anomalib-csflow authors"
release = version = version_of("anomalib-csflow")
html_title = f"{project} {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml"]
exclude_patterns = ["_build", "benchmark"]  # the benchmark's table is part of the results page
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["page.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"  # our own: the others load a script from the network, or need LaTeX

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# -- the reference, from docstrings ---------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
maximum_signature_line_length = 80
python_display_short_literal_types = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]
napoleon_use_ivar = True

nitpicky = True
nitpick_ignore_regex = [
    # other projects have their own pages, which would need the network
    (r"py:.*", r"(anomalib|collections|FrEIA|jsonargparse|lightning|numpy|pathlib|PIL|torch|typing)\..*"),
    (r"py:class", r"anomalib_csflow\.runtime\.bundle\.GoodScale"),  # an attribute's type, which users do not make
    (r"py:.*", r"(Any|Callable|Path|Self)"),
    # parts of types that a docstring names in words
    (r"py:class", r"(optional|callable)"),
    (r"py:class", r"'\w+'"),  # a choice of an attribute's Literal
]
