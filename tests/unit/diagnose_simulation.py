"""Simulated banks with planted truths, written without the code under test.

`simulate_bank` returns the token table that a scored bank would give, and the population values its
gain was made from. Normalization, quadrants and thirds are computed here from their definitions
with numpy. Prompts differ in level and in slope, so that tokens of one prompt are alike and an
interval that forgets it is too narrow.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """Population values of a simulated gain; 0 where it was not planted."""

    learnable: float
    """beta_L per standard deviation of D^L."""
    incompatible: float
    q3_gap: float
    """Top minus bottom third of C in Q3; exact only if both betas are 0."""


def scale(values):
    """eq. 11 by definition."""
    low, high = np.quantile(values, [0.05, 0.95])
    return np.clip((values - low) / (high - low), 0, 1)


def z_score(values):
    return (values - values.mean()) / values.std()


def features_by_definition(entropy, disagreement, compatibility):
    """H~, D~, C~, D^L, D^I and who is in Q3, by definition."""
    h, d, c = scale(entropy), scale(disagreement), scale(compatibility)
    q3 = (h < np.median(h)) & (d >= np.median(d))
    return h, d, c, d * c, d * (1 - c), q3


def simulate_bank(
    *,
    num_prompts=120,
    num_completions=1,
    length=12,
    learnable=0.0,
    incompatible=0.0,
    q3_gap=0.0,
    noise=0.3,
    prompt_level=0.1,
    prompt_slope=0.1,
    order=(),
    surface=None,
    ks=(16,),
    seed=0,
):
    """A token table and its `Truth`.

        gain = 0.2 + (beta_L + u_p) z(D^L) + beta_I z(D^I) + (q3_gap + u_p) 1[top third of C in Q3]
               + v_p + noise

    with one u_p and v_p per prompt, mean 0; a slope's u_p joins only a planted effect. `order`: score
    functions of (h, d, c), best first, each of whose top 5 % gets a plateau of its own, the first
    name the highest.
    """
    rng = np.random.default_rng(seed)
    num_rollouts = num_prompts * num_completions
    num = num_rollouts * length
    completion = np.repeat(np.arange(num_rollouts), length)
    prompt = completion // num_completions
    tokens = pd.DataFrame(
        {
            "completion": completion,
            "prompt": prompt,
            "position": np.tile(np.arange(length), num_rollouts),
            "token_id": rng.integers(0, 1000, num),
            "entropy": rng.gamma(1.5, 0.5, num),
            "teacher_entropy": rng.gamma(1.5, 0.4, num),
            "student_logprob": -rng.gamma(1.0, 1.0, num),
            "teacher_logprob": -rng.gamma(1.0, 1.5, num),
        }
    )
    latent_d, latent_c = rng.gamma(1.0, 0.8, num), rng.beta(3, 1.5, num)
    for k in ks:
        # The same positions seen through another K: a little more mass, a little more divergence.
        mass = latent_c ** (16 / k) if k != 16 else latent_c
        tokens[f"disagreement_k{k}"] = latent_d * (1 + 0.1 * np.log(k / 16))
        tokens[f"compatibility_k{k}"] = mass
        tokens[f"bound_k{k}"] = mass * rng.uniform(0.9, 1.0, num)
        tokens[f"overlap_k{k}"] = np.round(k * mass) / k
        tokens[f"jaccard_k{k}"] = tokens[f"overlap_k{k}"] / (2 - tokens[f"overlap_k{k}"])
        tokens[f"bc_k{k}"] = np.sqrt(mass)
    tokens["forward_kl"], tokens["reverse_kl"] = 1.1 * latent_d + 0.01, 0.9 * latent_d + 0.01
    h, d, c, d_l, d_i, q3 = features_by_definition(tokens["entropy"].to_numpy(), latent_d, latent_c)
    level = prompt_level * rng.standard_normal(num_prompts)[prompt]
    slope = prompt_slope * rng.standard_normal(num_prompts)[prompt]
    gain = 0.2 + level + noise * rng.standard_normal(num)
    if learnable or incompatible:
        gain += (learnable + slope) * z_score(d_l) + incompatible * z_score(d_i)
    if q3_gap:
        top = q3 & (c >= np.quantile(c[q3], 2 / 3))
        gain += (q3_gap + slope) * top
    if surface is not None:
        gain += surface(h, d, c)
    for place, score in enumerate(reversed(order)):
        best = np.argsort(-score(h, d, c), kind="stable")[: round(0.05 * num)]
        gain[best] = 1.0 + place + noise * rng.standard_normal(len(best))
    tokens["gain_forward"] = gain
    tokens["gain_reverse"] = 0.8 * gain + 0.02 * rng.standard_normal(num)
    for name in ("forward", "reverse"):
        tokens[f"gain_{name}_share"] = tokens[f"gain_{name}"] / (tokens[f"{name}_kl"] + 1e-12)
    return tokens, Truth(learnable=learnable, incompatible=incompatible, q3_gap=q3_gap)
