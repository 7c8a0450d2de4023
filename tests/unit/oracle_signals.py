"""Oracles of the further signals: one position, plain Python floats, from two lists of probabilities."""

import math

import torch


def top(probs, k):
    return sorted(range(len(probs)), key=lambda v: -probs[v])[:k]


def supports(student, teacher, k):
    """(S, S u T) as sets of ids."""
    return set(top(student, k)), set(top(student, k)) | set(top(teacher, k))


def log_ratio_variance(student, teacher, k):
    _, union = supports(student, teacher, k)
    mass = sum(student[v] for v in union)
    weight = {v: student[v] / mass for v in union}
    ratio = {v: math.log(teacher[v] / student[v]) for v in union}
    mean = sum(weight[v] * ratio[v] for v in union)
    return sum(weight[v] * (ratio[v] - mean) ** 2 for v in union)


def information_to_error(student, teacher, k, sampled, floor=-12.0):
    """From the published formula, with the logarithms floored before anything else."""
    _, union = supports(student, teacher, k)
    union = sorted(union | {sampled})
    if len(union) == 1:
        return 0.0  # no gradient at all
    log_p = {v: max(math.log(student[v]), floor) for v in union}
    log_q = {v: max(math.log(teacher[v]), floor) for v in union}
    mass = sum(math.exp(log_p[v]) for v in union)
    p = {v: math.exp(log_p[v]) / mass for v in union}
    r = {v: max(-30.0, min(30.0, log_p[v] - log_q[v])) for v in union}
    odds = {v: (1 - p[v]) / p[v] for v in union}

    def expect(f):
        return sum(p[v] * f(v) for v in union)

    base = expect(lambda v: r[v] * odds[v]) / expect(lambda v: odds[v])
    mean = expect(lambda v: r[v])
    variance = expect(lambda v: (r[v] - mean) ** 2)
    error = expect(lambda v: (r[v] - base) ** 2 * odds[v]) - variance
    return variance / max(error, 1e-9 * variance)


def information_to_error_by_sampling_theory(student, teacher):
    """Full support: |mean gradient|^2 over its one-sample variance, in the inverse Fisher norm, at the best
    baseline. From the gradients themselves, g_v = (r_v - b)(e_v - p)."""
    p, q = (torch.tensor(x, dtype=torch.float64) for x in (student, teacher))
    r = (p / q).log()
    fisher = torch.diag(p) - torch.outer(p, p)
    norm = torch.linalg.pinv(fisher, rtol=1e-12)
    score = torch.eye(len(p), dtype=torch.float64) - p  # row v: e_v - p

    def second_moment(b):
        gradients = (r - b).unsqueeze(1) * score
        return (p * torch.einsum("vi,ij,vj->v", gradients, norm, gradients)).sum()

    mean = (p.unsqueeze(1) * r.unsqueeze(1) * score).sum(
        0
    )  # the baseline adds nothing in expectation
    information = mean @ norm @ mean
    # A parabola in b: its minimum from three values.
    low, middle, high = (float(second_moment(b)) for b in (-1.0, 0.0, 1.0))
    curvature, slope = (low + high) / 2 - middle, (high - low) / 2
    return float(information) / (middle - slope**2 / (4 * curvature) - float(information))


def corrective_mass(student, teacher, k):
    support, _ = supports(student, teacher, k)
    return sum(max(teacher[v] - student[v], 0.0) for v in support)


def accepted(student, teacher, k):
    return float(top(student, 1)[0] in top(teacher, min(k, 5)))


def margin(student, teacher, k):
    """Largest minus second largest of the teacher's probabilities on the student's list, as shares of it."""
    support, _ = supports(student, teacher, k)
    shares = sorted((teacher[v] / sum(teacher[u] for u in support) for v in support), reverse=True)
    return shares[0] - (shares[1] if k > 1 else 0.0)
