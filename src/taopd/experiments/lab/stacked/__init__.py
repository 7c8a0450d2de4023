"""Many arms of one tiny lab trained at once, their weights stacked; for leaderboards and long runs."""

from taopd.experiments.lab.stacked.run_stack import run_stack
from taopd.experiments.lab.stacked.train import Stack, StackStep

__all__ = ["Stack", "StackStep", "run_stack"]
