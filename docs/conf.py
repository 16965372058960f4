"""Settings of the documentation site; `./scripts/docs` builds it."""

import sys
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here / "_ext"))

import genemodel  # noqa: E402  (the path above is for the extension only)

project = "genemodel"
author = "the genemodel authors"
copyright = "the genemodel authors, Apache-2.0"
release = version = genemodel.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "generated_pages",
]
root_doc = "index"
exclude_patterns = ["_build", "images", "**.ipynb_checkpoints"]

# The numpydoc sections of the package; types come from the annotations, which mypy checks.
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
maximum_signature_line_length = 88
add_module_names = False

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type"]  # widgets of other libraries keep a text beside

# Notebooks are kept with their outputs: `./scripts/docs notebooks` executes them in full, and
# tests/test_notebooks.py in small.
nb_execution_mode = "off"
nb_merge_streams = True

html_theme = "furo"
html_title = f"genemodel {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
copybutton_prompt_text = r">>> |\$ "
copybutton_prompt_is_regexp = True
linkcheck_timeout = 20
