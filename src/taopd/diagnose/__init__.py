"""The fixed-context diagnostic: which disagreement was learned, and does teachability predict it?"""

from taopd.diagnose.bootstrap import Bootstrap, cluster_bootstrap
from taopd.diagnose.features import GAINS, PROXIES, discover_gains, discover_ks, token_features
from taopd.diagnose.kept_sets import hard_selectors
from taopd.diagnose.matched import MatchedBank, matched_banks, matched_differences, matched_top_n
from taopd.diagnose.quadrants import q3_buckets, q3_gap
from taopd.diagnose.regression import decomposition
from taopd.diagnose.robustness import gain_curve, robustness
from taopd.diagnose.verdicts import Verdict, verdicts

__all__ = [
    "GAINS",
    "PROXIES",
    "Bootstrap",
    "MatchedBank",
    "Verdict",
    "cluster_bootstrap",
    "decomposition",
    "discover_gains",
    "discover_ks",
    "gain_curve",
    "hard_selectors",
    "matched_banks",
    "matched_differences",
    "matched_top_n",
    "q3_buckets",
    "q3_gap",
    "robustness",
    "token_features",
    "verdicts",
]
