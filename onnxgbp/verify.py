"""The proof of a converted file: what it must still be, what it must not hold, whether its attribution is right, and
what stands in the way of the runtimes that it is meant for.

Each check is one row: a figure that must not exceed its tolerance, and a sentence. The inputs are drawn from a fixed
seed, so that the same file gives the same report. The checks themselves stand in `checks/`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from onnxgbp.checks import attribution, file
from onnxgbp.checks.deployment import Runtime, parse_runtime, stands_in_the_way
from onnxgbp.checks.row import Check, row
from onnxgbp.checks.subject import Subject
from onnxgbp.errors import OnnxgbpError, printable
from onnxgbp.scale import computes_in_float16

__all__ = ["Check", "Report", "verify_model"]


@dataclasses.dataclass(frozen=True)
class Report:
    """What was checked of one file."""

    file: str
    source: str | None
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with keys that stay; a figure that is not finite becomes null."""
        rows = [dataclasses.asdict(check) for check in self.checks]
        for told in rows:
            told["figure"] = told["figure"] if told["figure"] is not None and math.isfinite(told["figure"]) else None
        return {"file": self.file, "source": self.source, "passed": self.passed, "checks": rows}

    def to_text(self) -> str:
        lines = []
        width = max(len(check.name) for check in self.checks)
        for check in self.checks:
            figure = f"{check.figure:.2g} <= {check.tolerance:.2g}" if check.figure is not None else ""
            if check.figure is not None and not check.passed:
                figure = f"{check.figure:.2g}, tolerance {check.tolerance:.2g}"
            said = f"{figure}: {check.detail}" if figure else check.detail
            lines.append(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<{width}}  {said}")
        failed = sum(not check.passed for check in self.checks)
        lines.append(f"{self.file}: " + (f"{failed} of {len(self.checks)} checks failed" if failed else "verified"))
        return "\n".join(map(printable, lines))


def verify_model(
    out: str | Path,
    source: str | Path | None = None,
    *,
    runtimes: Sequence[str] = (),
    provider: str = "cpu",
    tolerance: float = attribution.TOLERANCE,
) -> Report:
    """Checks a converted file.

    Args:
        out: the file that `convert` wrote.
        source: the model that it was made from. Without it, the forward part is cut out of the file itself: then a
            weight that was changed in both directions cannot be noticed.
        runtimes: where the file shall run, a row each: see `checks/deployment.py`.
        provider: where the row `runtime` runs the file: cpu, cuda (or the row fails), or auto, cuda where it works.
        tolerance: of that row, 1 - cosine to the reference evaluator, or to the CPU where that cannot run the file.

    Raises:
        OnnxgbpError: `out` cannot be read or is no converted file, `source` cannot be read, onnxruntime is missing, or
            an option is none. Everything else that is wrong is a failing row.
    """
    if not 0 < tolerance < 1:
        raise OnnxgbpError(f"tolerance {tolerance:g} is no bound for 1 - cosine: give one between 0 and 1")
    asked = [parse_runtime(text) for text in runtimes]
    out, source = Path(out), Path(source) if source is not None else None
    rows = _rows(Subject(out, source), asked, provider, tolerance)
    return Report(str(out), str(source) if source else None, tuple(rows))


def _rows(subject: Subject, runtimes: Sequence[Runtime], provider: str, tolerance: float) -> Iterator[Check]:
    checks: dict[str, Callable[..., Check | str]] = {"recorded facts": file.facts, "standard operators": file.standard}
    if subject.source is not None:
        checks |= {"source file": file.source_file, "forward structure": file.structure}
    checks |= {"forward unchanged": file.forward_unchanged, "attribution": attribution.finite_difference}
    checks["attribution reproduced"] = attribution.reproduced
    if computes_in_float16(subject.converted.model.graph):
        checks["float16 range"] = attribution.float16_range
    checks["runtime"] = functools.partial(attribution.runtime, provider=provider, tolerance=tolerance)
    for runtime in runtimes:
        checks[f"for {runtime}"] = functools.partial(stands_in_the_way, runtime=runtime)
    for name, check in checks.items():
        yield row(name, functools.partial(check, subject))
