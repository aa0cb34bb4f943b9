"""The README's table of speed, from `tools/bench.json`; `readme_table.py` puts it there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "bench.json"

HEAD = """\
| network, batch | forward | guided | x forward | gradient, x forward | Captum | Captum / ours | memory, x forward |
|---|---|---|---|---|---|---|---|"""


def bench_markdown() -> str:
    """The table of the rows that compare with peers, and a line on where it was measured."""
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if not row.get("growth") and not row.get("targets") and row["case"] != "convert":
            cases.setdefault((row["network"], row["batch"]), {})[row["case"]] = row
    lines = [HEAD]
    for (network, batch), found in cases.items():
        forward, guided, gradient = (found[case] for case in ("forward", "guided", "gradient"))
        captum = min(_time(row)[0] for case, row in found.items() if case.startswith("captum"))
        spent, ratio = _time(guided)
        lines.append(
            f"| {network}, {batch} | {_time(forward)[0]:.1f} ms | {spent:.1f} ms | {ratio:.2f} | "
            f"{_time(gradient)[1]:.2f} | {captum:.1f} ms | {captum / spent:.1f} | {guided['rss_ratio']:.1f} |"
        )
    for machine in sorted({_machine(row) for row in rows}):
        lines += ["", machine]
    return "\n".join(lines)


def _time(row: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds, and how often the forward pass: of one thread the CPU time, which no other load changes."""
    if row["threads"] == 1:
        return row["least_cpu_ms"], row["cpu_ratio"]
    return row["median_ms"], row["ratio"]


def _machine(row: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if name != "onnxgbp")
    threads = "CPU time of 1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
    return f"{row['cpu']}, {threads}, provider {row['provider']}; {versions}."
