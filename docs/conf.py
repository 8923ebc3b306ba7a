"""How `make docs` builds the manual. The pages of docs/ are Markdown, the reference comes from the docstrings."""

from __future__ import annotations

import lit_fast

project = "lit_fast"
author = "the lit_fast developers"
copyright = f"2026, {author}"
version = release = lit_fast.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "requirements.txt"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures show them where they matter; the text says units and shapes
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"lit_fast {version}"
