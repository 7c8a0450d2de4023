"""The sources of the documentation site: the pages of docs/, and reference pages made from the code.

`python -m scripts.site build` writes build/docs and build/mkdocs.yml; `make docs` makes the site of them.
"""
