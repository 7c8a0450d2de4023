"""The signals of a token by name: the key in tables and files, and how a person reads it.

Everything that writes, checks, packs or shows a signal reads this table. It imports no torch, so that the
report and the help pages can read it too.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SignalName:
    """One number per token: its key, and its words on a page."""

    key: str
    symbol: str
    title: str
    unit: str
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


_C = "teacher's mass on the student's top-K, 0 to 1"
_REACH = "teacher's mass on what the initial student could have said, 0 to 1"
SIGNALS = {
    signal.key: signal
    for signal in (
        SignalName("disagreement", "D", "disagreement", "nats", "s"),
        SignalName("compatibility", "C", "compatibility", _C, "s", top=1.0),
        SignalName("reach", "r", "reach", _REACH, "s", top=1.0),
        SignalName("entropy", "H", "the student's entropy", "nats", "s"),
        SignalName("learnable", "Dᴸ", "learnable disagreement", "D̃·C̃, 0 to 1", "s"),
        SignalName(
            "incompatible",
            *("Dᴵ", "incompatible disagreement", "D̃·(1 \N{MINUS SIGN} C̃), 0 to 1", "o"),
        ),
        SignalName("score", "", "the selector's score", "as the selector gave it", "s"),
        SignalName("gain", "", "gain since the bank was frozen", "nats; orange: it got worse", "s"),
        SignalName("student_logprob", "", "the student's log-prob of the token", "nats"),
        SignalName("teacher_logprob", "", "the teacher's log-prob of the token", "nats"),
    )
}
"""In the order of the page; `rollouts.jsonl` and the columns of the page have these keys."""
KEPT = SignalName("kept", "", "kept or not", "underlined: the teacher taught it", "s")
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
