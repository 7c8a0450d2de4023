"""The signals of a token by name: the key in tables and files, and how a person reads it.

Everything that writes, checks, packs or shows a signal reads this table. It imports no torch, so that the
report and the help pages can read it too.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalName:
    """One number per token: its key, and its words on a page."""

    key: str
    title: str
    symbol: str = ""
    unit: str = "nats"
    """A unit, or what the number is and its range."""
    ramp: str = ""
    """Colors of the inspector: "s" blue, "o" orange; "": tokens are not shaded by it."""
    top: float | None = None
    """Value of the darkest shade; None: from the tokens in the report."""

    @property
    def name(self) -> str:
        return f"{self.symbol}, {self.title}" if self.symbol else self.title

    @property
    def short(self) -> str:
        return self.symbol or self.key


SIGNALS = {
    signal.key: signal
    for signal in (
        SignalName(key="disagreement", symbol="D", title="disagreement", ramp="s"),
        SignalName(
            key="compatibility",
            symbol="C",
            title="compatibility",
            unit="teacher's mass on the student's top-K, 0 to 1",
            ramp="s",
            top=1.0,
        ),
        SignalName(key="entropy", symbol="H", title="the student's entropy", ramp="s"),
        SignalName(
            key="learnable",
            symbol="Dᴸ",
            title="learnable disagreement",
            unit="D̃·C̃, 0 to 1",
            ramp="s",
        ),
        SignalName(
            key="incompatible",
            symbol="Dᴵ",
            title="incompatible disagreement",
            unit="D̃·(1 \N{MINUS SIGN} C̃), 0 to 1",
            ramp="o",
        ),
        SignalName(
            key="score", title="the selector's score", unit="as the selector gave it", ramp="s"
        ),
        SignalName(
            key="gain",
            title="gain since the bank was frozen",
            unit="nats; orange: it got worse",
            ramp="s",
        ),
        SignalName(key="student_logprob", title="the student's log-prob of the token"),
        SignalName(key="teacher_logprob", title="the teacher's log-prob of the token"),
    )
}
"""In the order of the page; `rollouts.jsonl` and the columns of the page have these keys."""
KEPT = SignalName(
    key="kept", title="kept or not", unit="underlined: the teacher taught it", ramp="s"
)
"""No number, but what the inspector can show in place of one."""
SHADES = {key: signal for key, signal in (SIGNALS | {KEPT.key: KEPT}).items() if signal.ramp}
"""What tokens can be shaded by."""
SELECTED_BY = ("disagreement", "compatibility", "entropy")
"""The columns that every selector gets."""
SHADES_OF_RUNS = tuple(key for key in SHADES if key != "gain")
"""A gain is measured on a bank; the rollouts of a run have none."""
ORDERS = {
    "logged": "as logged",
    "taught": "most taught",
    "disagreement": "largest disagreement",
    "incompatible": "most incompatible",
}
"""Orders of rollouts and their words."""
QUADRANTS = {1: "high H, high D", 2: "high H, low D", 3: "low H, high D", 4: "low H, low D"}
"""Of entropy and disagreement, split at the medians of the batch."""
