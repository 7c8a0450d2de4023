"""Slow oracle of R1-R18, written from the rules in plain Python floats; no torch, no taopd.

Tests and benchmarks compare the vectorized code with this one. It follows the wording of the rules
and makes no attempt to be fast.
"""

import math

FLOOR = 1e-12

ORACLE_METHODS = (
    "full",
    "entropy",
    "divergence",
    "tip",
    "compatibility",
    "ca_softor",
    "split_budget_ca",
    "q3",
    "q3_highc",
    "q3_lowc",
    "dlearn_high",
    "q3_teachability_high",
    "q3_teachability_low",
    "q3_dincompat_high",
    "dincompat_high",
)


def support(entries):
    """R1: drop non-finite log-probs; (ids in list order, mapping id -> probability)."""
    finite = [(logprob, token) for logprob, token in entries if math.isfinite(logprob)]
    return [token for _, token in finite], {token: math.exp(x) for x, token in finite}


def entropy(probs):
    """R4: (nats, divided by ln(max(n, 2))) of the positive probabilities, renormalized."""
    positive = [p for p in probs.values() if p > 0]
    if len(positive) <= 1:
        return 0.0, 0.0
    mass = sum(positive)
    nats = -sum(p / mass * math.log(p / mass) for p in positive)
    return nats, nats / math.log(max(len(positive), 2))


def union_geometry(student, teacher):
    """R3: (D, reverse D, Bhattacharyya) on the union of both supports."""
    inserted = [*student, *teacher]
    union = set(inserted)  # summed in this order: last bits decide ties downstream
    student_mass = sum(student.get(v, 0.0) for v in union)
    teacher_mass = sum(teacher.get(v, 0.0) for v in union)
    if not union or student_mass <= 0 or teacher_mass <= 0:
        return 0.0, 0.0, 0.0
    p = [max(student.get(v, 0.0) / student_mass, FLOOR) for v in union]
    q = [max(teacher.get(v, 0.0) / teacher_mass, FLOOR) for v in union]
    pairs = list(zip(p, q, strict=True))
    forward = sum(b * (math.log(b) - math.log(a)) for a, b in pairs)
    reverse = sum(a * (math.log(a) - math.log(b)) for a, b in pairs)
    return forward, reverse, sum(math.sqrt(a * b) for a, b in pairs)


def token_metrics(student_top, teacher_top, k, requested=None, target=None):
    """Every metric of one position, under the golden file's names."""
    student_ids, student = support(student_top)
    teacher_ids, teacher = support(teacher_top)
    forward, reverse, bhattacharyya = union_geometry(student, teacher)
    bound = min(1.0, max(0.0, sum(teacher.get(v, 0.0) for v in student)))
    mass = bound
    if requested is not None:
        _, known = support(requested)
        mass = min(1.0, max(0.0, sum(known.get(v, 0.0) for v in student)))
    student_nats, student_scaled = entropy(student)
    teacher_nats, teacher_scaled = entropy(teacher)
    return {
        "KLf_union": forward,
        "KLr_union": reverse,
        "CBC": bhattacharyya,
        "Cmass": mass,
        "Cmass_topk": bound,
        "Coverlap": len(set(student) & set(teacher)) / k,
        "Hs_topk": student_nats,
        "Ht_topk": teacher_nats,
        "Hs_topk_norm": student_scaled,
        "Ht_topk_norm": teacher_scaled,
        "student_topk_mass": sum(student.values()),
        "teacher_topk_mass": sum(teacher.values()),
        "reach_t1": int(bool(teacher_ids) and teacher_ids[0] in student),
        "target_student_rank": student_ids.index(target) + 1 if target in student else None,
        "target_teacher_rank": teacher_ids.index(target) + 1 if target in teacher else None,
    }


def quantile(values, q):
    """R9: linear interpolation at q (n - 1)."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] * (1 - (place - low)) + ordered[high] * (place - low)


def normalize(values, how="quantile"):
    """R8, R10."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return [0.0] * len(values)
    if how == "quantile":
        low, high = quantile(finite, 0.05), quantile(finite, 0.95)
    elif how == "minmax":
        low, high = min(finite), max(finite)
    else:
        low, high = 0.0, max(max(finite), 1e-12)
    if abs(high - low) < 1e-12:
        return [0.0] * len(values)
    return [
        min(1.0, max(0.0, (v - low) / (high - low))) if math.isfinite(v) else 0.0 for v in values
    ]


def scores(disagreement, compatibility, entropies, how="quantile"):
    """Normalized columns, scores and quadrants (1..4), R8-R11."""
    h, d, c = (normalize(x, how) for x in (entropies, disagreement, compatibility))
    dc = normalize([a * b for a, b in zip(disagreement, compatibility, strict=True)], how)
    median_h, median_d = quantile(h, 0.5), quantile(d, 0.5)
    rows = list(zip(h, d, c, dc, strict=True))
    return {
        "H_norm": h,
        "D_norm": d,
        "C_norm": c,
        "DC_norm": dc,
        "Dlearn": [d * c for h, d, c, dc in rows],
        "Dincompat": [d * (1 - c) for h, d, c, dc in rows],
        "tip_score": [h + d - h * d for h, d, c, dc in rows],
        "ca_softor_score": [h + dc - h * dc for h, d, c, dc in rows],
        "split_ca_score": [(1 - h) * dc for h, d, c, dc in rows],
        "quadrant": [
            (1 if d >= median_d else 2) if h >= median_h else (3 if d >= median_d else 4)
            for h, d, c, dc in rows
        ],
    }


SCORE_OF = {
    "entropy": "H_norm",
    "divergence": "D_norm",
    "tip": "tip_score",
    "compatibility": "C_norm",
    "ca_softor": "ca_softor_score",
    "dlearn_high": "Dlearn",
    "dincompat_high": "Dincompat",
    "q3": "split_ca_score",
    "q3_highc": "C_norm",
    "q3_lowc": "C_norm",
    "q3_teachability_high": "Dlearn",
    "q3_teachability_low": "Dlearn",
    "q3_dincompat_high": "Dincompat",
}


def select(scored, method, ratio, min_keep, completion, position, valid, gamma=0.5):
    """R12-R18: the kept flag of every row."""
    rows = [i for i, ok in enumerate(valid) if ok]
    if method == "full" or ratio >= 1 or not rows:
        return list(valid)

    def ordered(candidates, name, ascending=False):
        values = scored[name]
        if ascending:
            return sorted(candidates, key=lambda i: (values[i], -position[i], completion[i]))
        return sorted(candidates, key=lambda i: (-values[i], position[i], completion[i]))

    budget = max(1, math.ceil(ratio * len(rows)))
    if method == "split_budget_ca":
        chosen = ordered(rows, "H_norm")[: round(gamma * budget)]
        rest = [i for i in rows if i not in chosen]
        chosen += ordered(rest, "split_ca_score")[: budget - len(chosen)]
    else:
        candidates = rows
        if method.startswith("q3"):
            candidates = [i for i in rows if scored["quadrant"][i] == 3]
        ascending = method in ("q3_lowc", "q3_teachability_low")
        chosen = ordered(candidates, SCORE_OF[method], ascending)[:budget]
    kept = set(chosen)
    for number in sorted(set(completion)):
        mine = [i for i in rows if completion[i] == number]
        missing = min(min_keep, len(mine)) - sum(i in kept for i in mine)
        spare = ordered([i for i in mine if i not in kept], "ca_softor_score")
        kept.update(spare[: max(0, missing)])
    return [i in kept for i in range(len(valid))]
