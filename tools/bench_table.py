"""Writes the table of speed into the README, between its two marker comments, from `tools/bench.json`.

python tools/bench_table.py           rewrites it
python tools/bench_table.py --check   exit 1 where it is stale, and changes nothing
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "tools" / "bench.json"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

HEAD = """\
| network, batch | forward | guided | x forward | gradient, x forward | Captum | Captum / ours | memory, x forward |
|---|---|---|---|---|---|---|---|"""


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of the rows that compare with peers, and a line on where it was measured."""
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if not row.get("growth") and not row.get("targets"):
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


def current(text: str) -> str:
    """The README's text with the table as it should be.

    Raises:
        ValueError: the markers are missing or in the wrong order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md holds no table between {BEGIN} and {END}")
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))
    return f"{before}{BEGIN}\n\n{markdown(rows)}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    try:
        wanted = current(text)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if text == wanted:
        return 0
    if arguments == ["--check"]:
        print("the README's table of speed is stale: python tools/bench_table.py", file=sys.stderr)
        return 1
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
