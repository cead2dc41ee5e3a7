"""Settings of Sphinx. The source is the whole repository, so that the README's links are checked as well."""

project = "pab_kernels"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "*.md"]
exclude_patterns = [".*", "build", "dist", "outputs"]
html_theme = "furo"
html_title = "pab_kernels"
html_copy_source = False
myst_heading_anchors = 3
