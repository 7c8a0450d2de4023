"""Evaluation: sampled or greedy answers, graded, with standard errors."""
