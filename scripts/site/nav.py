"""The navigation of the site: its sections and the titles of its pages."""

from collections.abc import Iterable
from typing import Any

Tree = dict[str, Any]
NAV: Tree = {
    "Overview": "index.md",
    "Start": {
        "Install": "start/install.md",
        "Two-minute demo": "start/demo.md",
        "A real model": "start/real-model.md",
        "Your own pair": "start/own-pair.md",
        "Ten tasks": "start/tasks.md",
        "Examples": "start/examples.md",
        "From a TRL script": "start/from-trl.md",
        "Notebook of the diagnostic": "start/notebook.md",
    },
    "Guides": {
        "Choosing a selector and a budget": "guides/selector.md",
        "Comparing": "guides/comparing.md",
        "Prompts and models": "guides/models.md",
        "Checks before training": "guides/check.md",
        "Long runs": "guides/long-runs.md",
        "Reliability": "guides/reliability.md",
        "Other teachers": "guides/served.md",
        "Teachers": "guides/teachers.md",
        "On many GPUs": "guides/many-gpus.md",
        "Scaling": "guides/scaling.md",
        "Inside verl": "guides/verl.md",
        "Offline nodes": "guides/offline.md",
        "Report and files": "guides/files.md",
        "The report page": "guides/report.md",
    },
    "Concepts": {
        "Teachability": "concepts/teachability.md",
        "The fixed-context diagnostic": "concepts/diagnostic.md",
        "What collapses, and why": "concepts/collapse.md",
        "Formulas": "concepts/math.md",
        "The paper and its released code": "concepts/released-code.md",
    },
    "Reference": {
        "Settings": "reference/settings.md",
        "Metrics": "reference/metrics.md",
        "Command line": "reference/cli.md",
        "Files": "reference/files.md",
        "Study files": "reference/study.md",
        "Recipes": "reference/recipes.md",
        "API": {
            "Trainer and settings": "reference/api/trainer.md",
            "Signals": "reference/api/signals.md",
            "Selectors": "reference/api/selectors.md",
            "Losses": "reference/api/losses.md",
            "Kernels": "reference/api/kernels.md",
            "Models and prompts": "reference/api/models.md",
            "Teachers": "reference/api/teachers.md",
            "Diagnostic": "reference/api/diagnose.md",
            "Experiments": "reference/api/experiments.md",
            "Errors": "reference/api/errors.md",
        },
    },
    "Results": {
        "Overview": "results/index.md",
        "SmolLM2-135M": "results/smollm2.md",
        "SmolLM2-135M, selection or loss": "results/smollm2-forward.md",
        "SmolLM2-135M, three forms": "results/smollm2-order.md",
        "SmolLM2-135M, a long run": "results/smollm2-long.md",
        "SmolLM2-135M, a long run, pair 1": "results/smollm2-long-pair1.md",
        "SmolLM2-135M, which tokens": "results/smollm2-cpu.md",
        "SmolLM2-135M, the methods": "results/smollm2-methods.md",
        "SmolLM2-135M, the diagnostic": "results/smollm2-diagnostic.md",
        "SmolLM2-135M, its own teacher": "results/self.md",
        "Accelerator": "results/accelerator.md",
        "The published pairs": "results/paper.md",
        "The tiny lab, all selectors": "results/tinylab.md",
        "Dialect": "results/dialect.md",
        "Bilingual": "results/bilingual.md",
        "Reversal": "results/reversal.md",
        "The labs": "results/labs.md",
        "Long runs": "results/collapse.md",
        "The guard": "results/guard.md",
        "The choice of the default": "results/default.md",
        "Learning rates in the lab": "results/lab_rates.md",
        "A falling learning rate": "results/lab_schedules.md",
        "Labs made again": "results/labs_again.md",
        "Labs of other sizes": "results/lab_sizes.md",
        "Other settings in the lab": "results/settings.md",
        "Forms of reach": "results/reach_forms.md",
        "A cheaper reach": "results/reach_cheaper.md",
        "How long the start is held": "results/reach_longer.md",
        "Sorting letters": "results/letters.md",
        "Diagnostic": "results/diagnostic.md",
        "Speed and memory": "results/benchmarks.md",
    },
    "Contributing": {
        "Architecture": "contributing/architecture.md",
        "Tests and how to add": "contributing/tests.md",
        "Changelog": "changelog.md",
    },
}
"""Title to page, or to a section."""
HOMES = {
    "results/": "Results",
    "guides/": "Guides",
    "concepts/": "Concepts",
    "contributing/": "Contributing",
}
"""Where a page goes that the tree does not name, by its folder; all others to "More"."""


def navigation(titles: dict[str, str]) -> list[Any]:
    """The tree as mkdocs reads it, without pages that are not there, with those that it does not name.

    Args:
        titles: every page of the site, and its title.
    """
    tree = _present(NAV, titles)
    for page in sorted(set(titles) - set(_pages(NAV))):
        section = next((name for folder, name in HOMES.items() if page.startswith(folder)), "More")
        tree.setdefault(section, {})[titles[page]] = page
    return _as_lists(tree)


def _present(tree: Tree, titles: dict[str, str]) -> Tree:
    found: Tree = {}
    for title, value in tree.items():
        if isinstance(value, dict):
            found[title] = _present(value, titles)
        elif value in titles:
            found[title] = value
    return found


def _pages(tree: Tree) -> Iterable[str]:
    for value in tree.values():
        if isinstance(value, dict):
            yield from _pages(value)
        else:
            yield value


def _as_lists(tree: Tree) -> list[Any]:
    return [
        {title: _as_lists(value) if isinstance(value, dict) else value}
        for title, value in tree.items()
    ]
