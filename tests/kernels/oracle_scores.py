"""Scores by definition, in plain Python floats and probability space; shares no code with the package."""

import math


def logits_by_definition(hidden, weight, bias, scale, softcap, temperature) -> list[list[float]]:
    """z = softcap(scale (W h + b)) / temperature, from nested lists."""
    rows = []
    for state in hidden:
        row = []
        for index, column in enumerate(weight):
            z = math.fsum(a * b for a, b in zip(state, column, strict=True))
            z = (z + (bias[index] if bias is not None else 0.0)) * scale
            z = softcap * math.tanh(z / softcap) if softcap is not None else z
            row.append(z / temperature)
        rows.append(row)
    return rows


def scores_by_definition(row: list[float], k: int, target: int) -> dict:
    """Every field of `TopKScores` for one position, from its logits."""
    peak = max(row)
    total = math.fsum(math.exp(z - peak) for z in row)
    logsumexp = peak + math.log(total)
    probs = [math.exp(z - peak) / total for z in row]
    best = sorted(range(len(row)), key=lambda v: (-row[v], v))[:k]
    return {
        "target_logprobs": row[target] - logsumexp,
        "topk_logprobs": [row[v] - logsumexp for v in best],
        "topk_ids": best,
        "logsumexp": logsumexp,
        "entropy": -math.fsum(p * math.log(p) for p in probs if p > 0),
    }
