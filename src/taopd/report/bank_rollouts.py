"""Rollouts of a bank, one per checkpoint that was measured on it: the same tokens, gain by gain.

A folder of gains holds every feature and, per checkpoint, the gain of every token, so "two checkpoints
side by side" are two rollouts with the same completion. The words come from the bank's tokenizer, which
neither folder holds; a bank beside it that was frozen by taopd names the student's folder.
"""

from taopd.report.folders import Sources
from taopd.report.rollouts import Rollout


def bank_rollouts(sources: Sources, *, limit: int) -> list[Rollout]:
    """At most `limit` rollouts of the named folders of gains."""
    return []
