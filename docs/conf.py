"""The documentation site: Markdown pages here, API pages from the docstrings. `make docs` builds it."""

from __future__ import annotations

import slicemod

project = "slicemod"
version = release = slicemod.__version__
html_title = f"slicemod {version}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_show_copyright = False
exclude_patterns = ["benchmarks/*"]

myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

default_role = "code"  # docstrings are written with single backticks
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_rtype = False
