"""One row of the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from onnxgbp.compare import first_line

__all__ = ["Check", "Failed", "row"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One row: the figure (None where there is none to give) must not exceed the tolerance."""

    name: str
    passed: bool
    detail: str
    figure: float | None = None
    tolerance: float | None = None


class Failed(Exception):  # noqa: N818 - it is a finding, not a fault of the program
    """Why a check failed; it ends in a row."""


def row(name: str, check: Callable[[], Check | str]) -> Check:
    """Runs one check; whatever stops it is a failure of the file, told in one line."""
    try:
        outcome = check()
    except Failed as failure:
        return Check(name, False, str(failure))
    except Exception as error:  # noqa: BLE001 - runtimes raise many kinds, and a report has to hold each
        return Check(name, False, f"could not be checked: {first_line(error)}")
    return dataclasses.replace(outcome, name=name) if isinstance(outcome, Check) else Check(name, True, outcome)
