"""Experiments: arms of a comparison in processes of their own, studies, evaluation, and the tiny lab."""
