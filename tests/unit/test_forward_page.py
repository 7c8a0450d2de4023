"""The page about a forward KL on SmolLM2. Oracles: made-up arms, and the page that is committed."""

import json

from scripts.pages import forward_kl


def arm(name, right):
    curve = [[0, 0.0], [40, right.count("1") / len(right)]]
    return {
        **{"name": name, "seed": 0, "accuracy_curve": curve, "accuracy_sampled_curve": curve},
        **{"mean_tokens_greedy_curve": [[0, 48], [40, 23]], "right": right},
    }


def test_differences_are_paired_and_missing_arms_named():
    about = {"commit": "abc", "device": "cpu", "versions": {"torch": "2"}}
    arms = [arm("full", "0000"), arm("reach-10", "1101"), arm("full-forward", "1101")]
    text = forward_kl.page(about | {"arms": arms})
    assert "| full-forward | 0 | 75 | 75 | 23 |" in text
    assert "| reach-10 - full | +75.0 |" in text and "| full-forward - full | +75.0 |" in text
    assert "full-forward - reach-10" not in text  # They agree on every problem.
    assert "Not run: published-10-forward, random-10-forward, reach-10-forward." in text


def test_the_page_is_that_of_the_saved_file():
    saved = json.loads(forward_kl.SAVED.read_text())
    assert forward_kl.page(saved) == forward_kl.PAGE.read_text()
