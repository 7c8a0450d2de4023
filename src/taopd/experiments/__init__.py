"""Experiments: arms of a comparison in subprocesses, studies, evaluation, and the tiny lab."""
