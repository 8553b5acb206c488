"""How Sphinx makes the pages: `make docs`, into build/docs."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import fastreg  # noqa: E402

project = "fastreg"
author = "The fastreg authors"
copyright = "The fastreg authors, BSD 3-Clause"
version = release = fastreg.__version__.split(".dev")[0]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "made_pages",
    "mathml",
]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# The annotations stand in the signature, one argument a line; the text says what they mean.
autodoc_typehints = "signature"
python_maximum_signature_line_length = 60
add_module_names = False
toc_object_entries = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_param = False
napoleon_use_rtype = False

# A name of fastreg that is not found is an error. Those of others would need their projects' inventories,
# which lie on the network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!fastreg\b).*|fastreg\._.*|.*\.SmoothedLoss")]

smartquotes_action = "D"  # dashes alone: what stands in quotes is mostly code

html_theme = "furo"
html_title = f"fastreg {version}"
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_extra_path = ["llms.txt"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
