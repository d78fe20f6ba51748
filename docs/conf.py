"""The docs site: `make docs` builds it into build/docs, without a network."""

import sys
from importlib.metadata import version as installed
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

project = "mithridate"
author = "the authors of mithridate"
copyright = author
version = release = installed("mithridate")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "tools.site"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_in_temp = True  # what they write is no part of the site
nb_merge_streams = True
nb_execution_excludepatterns = [] if find_spec("transformers") else ["*hugging*"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Source"]
default_role = "code"
smartquotes = False  # `--out` is no dash

html_theme = "furo"
html_title = f"mithridate {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
