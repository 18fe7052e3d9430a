"""What the checks of `medreasoner doctor` find."""

from dataclasses import dataclass
from typing import Literal

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One line of the doctor's report."""

    name: str
    status: Literal["ok", "remark", "fail"]
    detail: str
    """What was seen."""
    mend: str = ""
    """One sentence that says what to do; empty where the status is ok."""


def check_amount(name: str, amount: float, *, need: float, wish: float, unit: str, mend: str) -> CheckResult:
    """An amount below `need` is a failure, one below `wish` a remark; `mend` says how to get more."""
    status: Literal["ok", "remark", "fail"] = "ok" if amount >= wish else "remark" if amount >= need else "fail"
    detail = f"{amount:.3g} {unit}"
    if status == "ok":
        return CheckResult(name=name, status=status, detail=detail)
    return CheckResult(name=name, status=status, detail=f"{detail}, at least {wish:.3g} advised", mend=mend)
