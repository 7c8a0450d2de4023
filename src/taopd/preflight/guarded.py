"""One item of the check: what it refuses, and what breaks in it, as a verdict of its own."""

from collections.abc import Callable

from taopd.errors import TaopdError
from taopd.preflight.subject import Missing, Subject, Unnamed
from taopd.preflight.verdict import BROKEN, Verdict, judge
from taopd.trainer.checkpoint.failure import nan_in_sampling

REFUSED = "not measured: these files or settings cannot be used"


def guarded(name: str, check: Callable[[Subject], Verdict], subject: Subject) -> Verdict:
    """Run one check; what it refuses is a fail of this check and of no other.

    An item that breaks by a fault of its own says nothing about the pair: a warning, which stops no run.
    """
    try:
        return check(subject)
    except Missing as missing:
        # What a broken item should have made is missing for the same reason: no fault of the user's either.
        cause = missing.__cause__
        refused = isinstance(cause, TaopdError | Missing | Unnamed) or nan_in_sampling(
            cause or missing
        )
        if refused:
            return judge(name, "not run", [("fail", str(missing))])
        return judge(name, BROKEN, [("warn", str(missing))])
    except Unnamed as unnamed:
        return judge(name, "not compared", [("warn", str(unnamed))])
    except TaopdError as error:  # says itself what to do
        return judge(name, REFUSED, [("fail", _line(error))])
    except Exception as error:
        if (what := nan_in_sampling(error)) is not None:
            return judge(name, "not measured", [("fail", f"{what[0].upper()}{what[1:]}.")])
        problem = f"{type(error).__name__}: {_line(error)}"
        return judge(name, BROKEN, [("warn", problem)])


def _line(error: BaseException) -> str:
    """Its words as a sentence: others follow it."""
    words = " ".join(str(error).split())
    return words if words.endswith((".", "?", "!")) else f"{words}."
