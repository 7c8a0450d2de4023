"""The analyses of the diagnostic. Oracles: planted truths, statsmodels, loops over rows."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st

from taopd.diagnose import (
    AnalysisSettings,
    TokenTable,
    decomposition,
    discover_gains,
    discover_ks,
    gain_curve,
    hard_selectors,
    matched_banks,
    matched_differences,
    matched_top_n,
    q3_buckets,
    q3_gap,
    robustness,
    token_features,
)
from taopd.diagnose.features import winsorize
from taopd.diagnose.gain import CheckpointGain
from taopd.diagnose.gain_analysis import analyse
from taopd.diagnose.quadrants import nearest_low, quantile_groups
from taopd.diagnose.regression import CONTRAST
from taopd.errors import ConfigError, DataError
from taopd.selectors import SELECTORS
from tests.unit.diagnose_simulation import features_by_definition, simulate_bank, z_score

FAST = AnalysisSettings(num_resamples=100)
ANALYSES = (decomposition, matched_top_n, q3_gap, q3_buckets, robustness)


@pytest.fixture(scope="module")
def bank():
    return simulate_bank(num_prompts=60, length=30, learnable=0.3, incompatible=0.1, ks=(8, 16))[0]


def by_definition(tokens, k=16):
    columns = ("entropy", f"disagreement_k{k}", f"compatibility_k{k}")
    return features_by_definition(*(tokens[name].to_numpy() for name in columns))


# -- features


def test_features_match_their_definition(bank):
    features = token_features(bank)
    h, d, c, learnable, incompatible, q3 = by_definition(bank)
    for name, expected in (("h", h), ("d", d), ("c", c), ("learnable", learnable)):
        np.testing.assert_allclose(features[name], expected, atol=1e-9)
    np.testing.assert_allclose(features["incompatible"], incompatible, atol=1e-9)
    assert ((features["quadrant"] == 3) == q3).all()


def test_reference_takes_the_relative_gain_and_puts_the_median_of_h_into_q3(bank):
    tokens = bank.iloc[:-1]  # an odd number of tokens: one of them is the median
    ours, theirs = token_features(tokens), token_features(tokens, AnalysisSettings(reference=True))
    assert (ours.attrs["unit"], theirs.attrs["unit"]) == ("nats", "share")
    np.testing.assert_array_equal(theirs["gain"], tokens["gain_forward_share"])
    moved = (ours["quadrant"] != theirs["quadrant"]).to_numpy()
    assert moved.sum() == 1
    assert theirs["h"][moved].iloc[0] == theirs["h"].median()


@pytest.mark.parametrize("analysis", ANALYSES)
def test_non_finite_gains_are_counted_and_left_out(bank, analysis):
    tokens = bank.copy()
    tokens.loc[[3, 17], "gain_forward"] = np.nan
    tokens.loc[40, "gain_forward"] = np.inf
    table = analysis(tokens, FAST)
    assert (table["n_excluded"] == 3).all() and (table["n"] == len(tokens) - 3).all()
    assert table.attrs["excluded"]["gain_forward"] == 3
    clean = analysis(tokens.drop(index=[3, 17, 40]), FAST)
    column = "beta" if "beta" in table else "value"
    np.testing.assert_array_equal(table[column], clean[column])


@pytest.mark.parametrize("analysis", ANALYSES)
def test_bad_tables_say_what_is_wrong(bank, analysis):
    with pytest.raises(DataError, match="empty"):
        analysis(bank.iloc[:0])
    with pytest.raises(DataError, match=r"none of the 1800 tokens is usable.*gain_forward 1800"):
        analysis(bank.assign(gain_forward=np.nan))
    with pytest.raises(DataError, match=r"no column 'gain_forward'.*Did you mean"):
        analysis(bank.drop(columns="gain_forward"))
    with pytest.raises(DataError, match="position 0 of completion 0 is in the token table twice"):
        analysis(pd.concat([bank, bank.iloc[:1]]))
    with pytest.raises(ConfigError, match="Did you mean 'prompt'"):
        analysis(bank, AnalysisSettings(cluster="promt"))


@pytest.mark.parametrize("analysis", ANALYSES)
def test_one_prompt_gives_values_without_intervals(bank, analysis):
    table = analysis(bank.assign(prompt=0), FAST)
    assert table["low"].isna().all() and table["high"].isna().all()
    assert table["note"].str.contains("one cluster only|fewer than|undecided").all()
    assert table["beta" if "beta" in table else "value"].notna().all()


@pytest.mark.parametrize("analysis", ANALYSES)
def test_row_order_does_not_matter(bank, analysis):
    shuffled = bank.sample(frac=1.0, random_state=0)
    pd.testing.assert_frame_equal(analysis(bank, FAST), analysis(shuffled, FAST))


def test_a_token_table_computes_the_features_of_a_setting_once(bank):
    table = TokenTable(bank)
    features = table.features(FAST)
    assert table.features(replace(FAST, seed=3, num_resamples=7)) is features
    for other in ({"k": 8}, {"gain": "gain_reverse"}, {"cluster": "completion"}):
        assert table.features(replace(FAST, **other)) is not features
    for analysis in ANALYSES:
        pd.testing.assert_frame_equal(analysis(table, FAST), analysis(bank, FAST))
    assert table.features(FAST) is features


def test_discovery_and_its_errors(bank):
    assert discover_ks(bank) == (8, 16)
    assert len(discover_gains(bank)) == 4
    with pytest.raises(DataError, match="disagreement_k"):
        discover_ks(bank[["entropy"]])
    with pytest.raises(DataError, match="no gain column"):
        discover_gains(bank[["entropy"]])
    with pytest.raises(ConfigError, match="winsor"):
        winsorize(np.ones(3), 0.5)


# -- decomposition


def test_decomposition_equals_statsmodels_on_columns_by_definition(bank):
    table = decomposition(bank, FAST, ks=[16], targets=["raw"])
    h, d, _, learnable, incompatible, _ = by_definition(bank)
    columns = [h, learnable, incompatible, h * d, bank["position"], bank["teacher_entropy"]]
    design = sm.add_constant(np.stack([z_score(np.asarray(x)) for x in columns], axis=1))
    fit = sm.OLS(bank["gain_forward"].to_numpy(), design).fit(
        cov_type="cluster", cov_kwds={"groups": bank["prompt"].to_numpy()}
    )
    rows = table[(table["model"] == "B") & (table["term"] != CONTRAST)]
    np.testing.assert_allclose(rows["beta"], fit.params[1:], rtol=1e-8)
    np.testing.assert_allclose(rows["standard_error"], fit.bse[1:], rtol=1e-6)
    np.testing.assert_allclose(rows["r2"], fit.rsquared, rtol=1e-8)
    # The bootstrap's spread agrees with the sandwich estimate: two routes to one quantity.
    spread = (rows["high"] - rows["low"]) / (2 * 1.96)
    np.testing.assert_allclose(spread, rows["standard_error"], rtol=0.35)


def test_decomposition_recovers_planted_slopes(bank):
    table = decomposition(bank, ks=[16], targets=["raw"])
    rows = table[table["model"] == "B"].set_index("term")
    for term, truth in (("learnable", 0.3), ("incompatible", 0.1), (CONTRAST, 0.2)):
        assert rows.loc[term, "low"] < truth < rows.loc[term, "high"]
    assert rows.loc[CONTRAST, "low"] > 0 and (rows["delta_r2_low"] > 0).all()


def test_decomposition_table_has_every_part(bank):
    table = decomposition(bank, FAST)
    assert set(table["target"]) == {"raw", "winsorized_1", "winsorized_5", "rank"}
    assert set(table["k"]) == {8, 16} and set(table["model"]) == {"baseline", "A", "B"}
    assert len(table) == 2 * 4 * (5 + 6 + 6 + 1)
    nested = table[(table["model"] != "baseline") & (table["target"] != "rank")]
    assert (nested["delta_r2"] > -1e-12).all()
    assert set(table.loc[table["target"] == "rank", "unit"]) == {"rank deviations"}


def test_rank_variant_ignores_monotone_transforms(bank):
    stretched = bank.assign(gain_forward=np.exp(3 * bank["gain_forward"]))
    one = decomposition(bank, FAST, ks=[16], targets=["rank"])
    two = decomposition(stretched, FAST, ks=[16], targets=["rank"])
    pd.testing.assert_frame_equal(one, two)


def test_constant_and_collinear_predictors_are_said(bank):
    table = decomposition(bank.assign(teacher_entropy=0.5), FAST, ks=[16], targets=["raw"])
    gone = table[table["term"] == "teacher_entropy"]
    assert gone["beta"].isna().all() and gone["note"].str.contains("constant").all()
    assert table[table["term"] != "teacher_entropy"]["beta"].notna().all()
    flat = decomposition(bank.assign(compatibility_k16=0.5), FAST, ks=[16], targets=["raw"])
    contrast = flat[flat["term"] == CONTRAST].iloc[0]
    assert np.isnan(contrast["beta"]) and "undefined" in contrast["note"]


@pytest.mark.parametrize("num_tokens", range(2, 10))
def test_as_many_coefficients_as_tokens_have_no_estimate(bank, num_tokens):
    """Every gain is fitted then, and the standard error was a division by zero."""
    short = bank[bank["position"] < 1].head(num_tokens)
    table = decomposition(short, FAST, ks=[16], targets=["raw"])
    for model, num_coefficients in (("baseline", 6), ("A", 7), ("B", 7)):
        rows = table[(table["model"] == model) & (table["term"] != CONTRAST)]
        varying = ~rows["note"].str.contains("constant in this bank")
        told = num_tokens > num_coefficients - (~varying).sum()
        assert np.isfinite(rows["beta"][varying]).all() == told
        assert rows["note"][varying].str.contains("tokens too few").all() == (not told)


def test_all_gains_equal_gives_notes_not_numbers(bank):
    table = decomposition(bank.assign(gain_forward=0.25), FAST, ks=[16])
    assert table["beta"].isna().all() and table["r2"].isna().all()


# -- matched top-N


def test_matched_values_equal_a_loop_over_sorted_scores(bank):
    table = matched_top_n(bank, FAST, budgets=[0.05], winsor=0.0).set_index("selector")
    _, _, _, learnable, incompatible, _ = by_definition(bank)
    gain = bank["gain_forward"].to_numpy()
    for name, score in (("teachability", learnable), ("incompatible", incompatible)):
        best = sorted(range(len(gain)), key=lambda row, s=score: -s[row])[:90]
        assert table.loc[name, "num_kept"] == table.loc[name, "num_requested"] == 90
        assert table.loc[name, "num_tied"] == 0
        assert table.loc[name, "value"] == pytest.approx(gain[best].mean())


def test_places_given_by_position_are_counted(bank):
    def run(**options):
        names = ["divergence", "teachability"]
        table = matched_top_n(bank, FAST, budgets=[0.01], selectors=names, **options)
        return table.set_index("selector")

    # D~ is 1 for the top twentieth, so all places of the top hundredth go by position.
    clipped = run()
    assert clipped.loc["divergence", "num_tied"] == 18
    assert "18 of 18 places by position" in clipped.loc["divergence", "note"]
    assert run(normalization="minmax").loc["divergence", "num_tied"] == 0


def test_every_hard_selector_keeps_exactly_n(bank):
    table = matched_top_n(bank, FAST)
    assert (
        set(table["selector"])
        == set(hard_selectors())
        == {name for name, rule in SELECTORS.items() if not rule.needs and not rule.weighted}
        - {"full"}
    )
    assert (table["num_kept"] == table["num_requested"]).all()
    assert sorted(set(table["num_requested"])) == [18, 54, 90, 180]


def test_a_banks_columns_serve_selectors_and_expressions_that_read_them(bank):
    """Sampled log-probs are in a bank; both models at both lists are not."""
    names = ["opsa", "0 - opsa", "teachability*entropy"]
    table = matched_top_n(bank, FAST, budgets=[0.05], selectors=names, winsor=0.0)
    found = table.set_index("selector")
    order = bank["student_logprob"].argsort()
    assert found.loc["opsa", "value"] == pytest.approx(bank["gain_forward"][order[:90]].mean())
    assert found.loc["0 - opsa", "num_kept"] == 90
    with pytest.raises(ConfigError, match=r"log_ratio_variance.*Possible without.*dial"):
        matched_top_n(bank, FAST, budgets=[0.05], selectors=["pgt"])


def test_random_is_always_there_and_near_the_mean(bank):
    table = matched_top_n(bank, budgets=[0.05], selectors=["entropy"], winsor=0.0)
    assert set(table["selector"]) == {"entropy", "random"}
    row = table.set_index("selector").loc["random"]
    assert row["low"] < bank["gain_forward"].mean() < row["high"]
    assert row["draw_low"] < row["low"] and row["high"] < row["draw_high"]
    assert row["minus_random"] == row["minus_random_low"] == 0


def test_too_few_candidates_are_said(bank):
    table = matched_top_n(bank, FAST, budgets=[0.5], selectors=["q3"]).set_index("selector")
    assert table.loc["q3", "num_kept"] < 900
    assert "candidates for 900 places" in table.loc["q3", "note"]


def test_planted_order_is_recovered():
    scores = (
        lambda h, d, c: d * c,
        lambda h, d, c: d * (1 - c),
        lambda h, d, c: h,
    )
    tokens, _ = simulate_bank(num_prompts=100, length=40, order=scores, seed=3)
    (found,) = matched_banks(
        tokens, budgets=[0.05], selectors=["teachability", "incompatible", "entropy"], winsor=0.0
    )
    means = dict(zip(found.names, found.boot.value, strict=True))
    assert sorted(means, key=means.get)[::-1] == [
        "teachability",
        "incompatible",
        "entropy",
        "random",
    ]
    pairs = [("teachability", "incompatible"), ("incompatible", "entropy"), ("entropy", "random")]
    table = matched_differences(found, pairs)
    assert (table["low"] > 0).all()
    assert (table["joint_low"] <= table["low"]).all()
    assert (table["joint_high"] >= table["high"]).all()
    # Its own top 5 % holds the plateau, whose height is 1.0 + place.
    low, high = found.boot.interval()
    assert low[0] < 3.0 < high[0]


def test_matched_errors(bank):
    with pytest.raises(ConfigError, match="Did you mean 'entropy'"):
        matched_top_n(bank, selectors=["entropie"])
    with pytest.raises(ConfigError, match="five percent"):
        matched_top_n(bank, budgets=[5.0])
    (found,) = matched_banks(bank, FAST, budgets=[0.05], selectors=["tip"])
    with pytest.raises(ConfigError, match="not in the bank"):
        matched_differences(found, [("tip", "entropy")])


# -- Q3


def test_q3_gap_equals_a_loop_over_rows(bank):
    table = q3_gap(bank, FAST, groups=[3]).set_index("version")
    h, d, c, _, _, q3 = by_definition(bank)
    low_cut, high_cut = np.quantile(c[q3], [1 / 3, 2 / 3])
    high, low = np.flatnonzero(q3 & (c >= high_cut)), np.flatnonzero(q3 & (c <= low_cut))
    gain = bank["gain_forward"].to_numpy()
    assert table.loc["plain", "value"] == pytest.approx(gain[high].mean() - gain[low].mean())
    inside = np.flatnonzero(q3)
    axes = np.stack(
        [(x - x[inside].mean()) / x[inside].std() for x in (h, d, bank["position"].to_numpy())], 1
    )
    differences = []
    for row in high:
        same = [j for j in low if bank["completion"][j] == bank["completion"][row]]
        if same:
            partner = min(same, key=lambda j, r=row: ((axes[j] - axes[r]) ** 2).sum())
            differences.append(gain[row] - gain[partner])
    assert table.loc["matched", "value"] == pytest.approx(np.mean(differences))
    assert table.loc["matched", "num_high"] == len(differences)


@pytest.mark.parametrize("seed", range(3))
def test_planted_gap_is_recovered(seed):
    tokens, truth = simulate_bank(num_prompts=150, length=40, q3_gap=0.3, seed=seed)
    table = q3_gap(tokens, groups=[3]).set_index("version")
    assert table.loc["plain", "low"] < truth.q3_gap < table.loc["plain", "high"]
    assert table.loc["matched", "low"] < truth.q3_gap < table.loc["matched", "high"]


def test_few_q3_tokens_are_undecided_not_an_error(bank):
    tiny = bank.iloc[:4]
    table = q3_gap(tiny.assign(prompt=range(4)), FAST)
    assert table["low"].isna().all() and table["note"].str.startswith("undecided").all()
    sparse = bank[bank["position"] < 3].assign(prompt=lambda t: range(len(t)))
    table = q3_gap(sparse, FAST, groups=[3])
    plain = table[table["version"] == "plain"].iloc[0]
    assert np.isfinite(plain["value"]) and np.isnan(plain["low"])
    assert "fewer than the" in plain["note"]


def test_equal_compatibility_has_no_thirds(bank):
    table = q3_gap(bank.assign(compatibility_k16=1.0), FAST)
    assert table["note"].str.contains("too many equal values").all()
    buckets = q3_buckets(bank.assign(compatibility_k16=1.0), FAST)
    assert (buckets.loc[buckets["feature"] == "c", "bucket"] == 0).all()


def test_buckets_partition_q3(bank):
    table = q3_buckets(bank, FAST)
    features = token_features(bank)
    inside = features[features["quadrant"] == 3]
    for _, rows in table.groupby("feature"):
        assert rows["num"].sum() == len(inside)
        weighted = (rows["num"] * rows["value"]).sum() / rows["num"].sum()
        assert weighted == pytest.approx(inside["gain"].mean())


coarse = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.0])


@settings(max_examples=100, deadline=None)
@given(st.lists(coarse | st.floats(0, 1), min_size=1, max_size=40), st.integers(2, 5))
def test_laws_of_quantile_groups(values, num_groups):
    values = np.array(values)
    found = quantile_groups(values, num_groups)
    if found is None:
        return
    codes, cuts = found
    assert codes.min() == 0 and codes.max() == num_groups - 1
    order = np.argsort(values, kind="stable")
    assert (np.diff(codes[order]) >= 0).all()  # ordered, and so ties are never split
    assert all(len(set(codes[values == v])) == 1 for v in set(values))
    assert values[codes == 0].max() <= cuts[0] <= cuts[-1] <= values[codes == num_groups - 1].min()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_pairs_stay_inside_their_completion(seed, num_completions):
    rng = np.random.default_rng(seed)
    q3 = pd.DataFrame(rng.random((30, 2)), columns=["h", "d"])
    q3["position"] = rng.integers(0, 9, 30)
    q3["completion"] = rng.integers(0, num_completions, 30)
    group = rng.integers(0, 3, 30)
    high, low = nearest_low(q3, group == 2, group == 0)
    completion = q3["completion"].to_numpy()
    assert (completion[high] == completion[low]).all()
    assert (group[high] == 2).all() and (group[low] == 0).all()
    with_low = set(completion[group == 0])
    assert len(high) == sum(completion[row] in with_low for row in np.flatnonzero(group == 2))


# -- robustness, curve


def test_robustness_has_every_proxy_and_k(bank):
    table = robustness(bank, FAST)
    assert len(table.groupby(["proxy", "k"])) == 5 * 2
    row = table[(table["proxy"] == "mass") & (table["k"] == 16)].reset_index(drop=True)
    pd.testing.assert_frame_equal(row, q3_gap(bank, FAST, groups=[3]))
    fewer = robustness(bank.drop(columns=["bc_k8"]), FAST)
    assert "bc" not in set(fewer["proxy"])
    with pytest.raises(DataError, match="bc_k8"):
        robustness(bank.drop(columns=["bc_k8"]), FAST, proxies=["bc"])


def test_gain_curve_follows_the_checkpoints(bank):
    later = bank.assign(gain_forward=bank["gain_forward"] + 1)
    table = gain_curve([(20, later), (10, bank)], FAST)
    assert list(table["step"]) == [10] * 4 + [20] * 4
    first, second = (table[table["step"] == step].set_index("group") for step in (10, 20))
    np.testing.assert_allclose(second["value"], first["value"] + 1)
    assert first.loc["all tokens", "value"] == pytest.approx(bank["gain_forward"].mean())
    with pytest.raises(DataError, match="no checkpoints"):
        gain_curve([])


@pytest.mark.parametrize(
    ("steps", "expected", "by_step"),
    [
        ((50, None), [1, 2], False),  # `runs/x/model` does not say its step
        ((50, 50), [1, 2], False),  # of two runs
        ((None, None), [1, 2], False),
        ((20, 50), [20, 50], True),
    ],
)
def test_a_curve_has_steps_or_places_and_never_both(steps, expected, by_step):
    tokens = simulate_bank(num_prompts=6, length=20, ks=(8,))[0]
    of_each = [tokens, tokens.assign(gain_forward=tokens["gain_forward"] + 1)]
    checkpoints = [
        CheckpointGain(label=f"c{step}", step=step, tokens=each)
        for step, each in zip(steps, of_each, strict=True)
    ]
    found = analyse(checkpoints, AnalysisSettings(num_resamples=2))
    curve = found.tables["gain_curve"].query("gain == 'gain_forward' and group == 'all tokens'")
    assert (curve["step"].tolist(), found.by_step) == (expected, by_step)
    assert curve["value"].diff().iloc[1] == pytest.approx(1)
