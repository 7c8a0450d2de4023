"""A pair of real language models from SmolLM2-135M-Instruct: weights, word problems, SFT, and the demo."""

from taopd.experiments.smollm2.pair import Pair, make_pair

__all__ = ["Pair", "make_pair"]
