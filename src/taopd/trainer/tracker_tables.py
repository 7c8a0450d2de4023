"""Tables for a live tracker: a sampled rollout token by token, and what another budget would buy.

The metrics themselves go through transformers' own tracker callbacks, so wandb and trackio get the names
of `taopd.trainer.metrics.METRICS` with the prefix that transformers gives them ("train/"). This adds what a
number cannot show, only to trackers that are active, and imports them only then.

Not here: pictures of the whole run; `taopd report` makes those from the run folder.
"""

import importlib
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from taopd.trainer.scored_batch import ScoredBatch

TRACKERS = ("wandb", "trackio")
TOKEN_COLUMNS = ("token", "D", "C", "H", "score", "rank", "kept")
BUDGETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
MAX_TOKENS = 400


class LiveTables(TrainerCallback):
    """Observer and callback: keeps the newest batch, and hands two tables to the trackers at a log.

    Args:
        trackers: names out of `TRACKERS`.
        every: optimizer steps between two tables.
    """

    def __init__(self, trackers: list[str], *, every: int = 50) -> None:
        self._trackers = trackers
        self._every = every
        self._tables: dict[str, tuple[list[str], list[list[Any]]]] = {}

    def __call__(self, scored: ScoredBatch) -> None:
        """Make the tables of a generation batch whose step is due."""
        if scored.step % self._every == 0:
            self._tables = {
                "inspector": (list(TOKEN_COLUMNS), token_rows(scored)),
                "budget": (["budget", "share of learnable disagreement"], budget_rows(scored)),
            }

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not self._tables:
            return
        for name in self._trackers:
            _log(name, self._tables, state.global_step)
        self._tables = {}


def token_rows(scored: ScoredBatch) -> list[list[Any]]:
    """Columns `TOKEN_COLUMNS` of the first completion of the batch."""
    here = (scored.positions.row == 0).nonzero().squeeze(1)[:MAX_TOKENS].cpu()
    selection, signals, local = scored.choice.selection, scored.signals, scored.local
    # Tables of a tracker are uploaded whole: one completion, cut, is enough for a look.
    tokens = scored.tokenizer.convert_ids_to_tokens(scored.token_ids.cpu()[here].tolist())
    columns = (
        signals.disagreement.cpu()[here],
        signals.compatibility.cpu()[here],
        signals.entropy.cpu()[here],
        selection.scores[local][here],
    )
    numbers = torch.stack([column.double() for column in columns], dim=1).tolist()
    ranks, kept = selection.order[local][here].tolist(), selection.kept[local][here].tolist()
    rows = zip(tokens, numbers, ranks, kept, strict=True)
    return [[token, *four, rank + 1, is_kept] for token, four, rank, is_kept in rows]


def budget_rows(scored: ScoredBatch) -> list[list[float]]:
    """Share of all D^L that the best tokens by D^L hold, at each of `BUDGETS`; of all that may train."""
    learnable = scored.choice.selection.learnable[scored.table.valid]
    values = learnable.sort(descending=True).values.double()
    total = float(values.sum())
    # At least one token: a budget of 1 % of a short batch rounds to none.
    counts = [max(1, round(budget * len(values))) for budget in BUDGETS]
    return [
        [budget, float(values[:count].sum()) / total if total else 0.0]
        for budget, count in zip(BUDGETS, counts, strict=True)
    ]


def _log(tracker: str, tables: dict[str, tuple[list[str], list[list[Any]]]], step: int) -> None:
    # Imported here: neither tracker is a dependency of the package.
    module = importlib.import_module(tracker)
    made: dict[str, Any] = {"train/global_step": step}
    for name, (columns, rows) in tables.items():
        key = f"taopd/{name}"
        if tracker == "wandb":
            table = module.Table(columns=columns, data=rows)
            made[key] = table
            if name == "budget":
                x, y = columns
                made["taopd/budget_plot"] = module.plot.line(table, x, y, title=f"{y} by budget")
        else:
            import pandas as pd

            made[key] = module.Table(dataframe=pd.DataFrame(rows, columns=columns))
            if name == "budget":
                made["taopd/budget_plot"] = module.Image(_budget_picture(columns, rows))
    module.log(made)


def _budget_picture(columns: list[str], rows: list[list[Any]]) -> np.ndarray:
    """The budget curve as pixels [height, width, 3], for a tracker that draws no lines of a table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*rows, strict=True), marker="o", markersize=3)
    axes.set(xlabel=columns[0], ylabel=columns[1], xlim=(0, 1), ylim=(0, 1.05))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def attach(trainer: Any) -> None:
    """Give a `TeachabilityTrainer` the tables, if it reports to a tracker that can show them."""
    trackers = [name for name in TRACKERS if name in trainer.args.report_to]
    if trackers:
        tables = LiveTables(trackers)
        trainer.observers.append(tables)
        trainer.add_callback(tables)
