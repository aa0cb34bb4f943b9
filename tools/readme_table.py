"""Writes the generated tables into the README and the pages of docs/, each between its two marker comments.

python tools/readme_table.py           rewrites them
python tools/readme_table.py --check   exit 1 where one is stale, and changes nothing
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_table import bench_markdown

from onnxgbp.operators import operator_markdown, operator_page

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT  # what the names below are relative to


def runtime_markdown() -> str:
    """What `tools/test --runtimes` found: of each runtime and net the largest error over batches and methods."""
    rows: list[dict[str, Any]] = json.loads((ROOT / "tests" / "runtimes.json").read_text(encoding="utf-8"))
    nets = list(dict.fromkeys(row["net"] for row in rows if "net" in row))
    return "\n".join(_runtime_lines(rows, nets))


def _runtime_lines(rows: list[dict[str, Any]], nets: list[str]) -> Iterator[str]:
    yield f"| runtime | version | {' | '.join(f'`{net}`' for net in nets)} | |"
    yield "|---" * (len(nets) + 3) + "|"
    for name in dict.fromkeys(row["runtime"] for row in rows):
        mine = [row for row in rows if row["runtime"] == name]
        # "ok" is what the figures say; anything else is said once.
        notes = "; ".join(dict.fromkeys(row["status"].removeprefix("known: ") for row in mine if row["status"] != "ok"))
        figures = [max((row["max_error"] for row in mine if row.get("net") == net), default=None) for net in nets]
        cells = ["" if figure is None else f"{figure:.0e}" for figure in figures]
        yield f"| {' | '.join([mine[0]['label'], mine[0]['version'] or '', *cells, notes])} |"


def batch_markdown() -> str:
    """What `tools/bench_batch.py` measured, a line for each run."""
    found: list[dict[str, Any]] = json.loads((ROOT / "tools" / "batch.json").read_text(encoding="utf-8"))
    headings = ["photos", "workers", "a second", "of ONNX Runtime alone", "MB after the first tenth, the last"]
    headings += ["killed, and gone on with", "a worker of Ray killed"]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in found:
        memory = row["memory in MB"]
        cells = [f"{row['images']:,}", str(row["workers"]), f"{row['images per second']:.1f}", f"{row['ratio']:.2f}"]
        cells += [f"{memory[1]}, {memory[-1]}", *(_ended(row.get(how)) for how in ("killed", "worker of Ray killed"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ended(disturbed: dict[str, Any] | None) -> str:
    if disturbed is None:
        return ""
    return f"{disturbed['times']} x: {'the same' if disturbed['same bytes'] else 'OTHER'} bytes"


# By the page that they stand in.
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"operators": operator_markdown, "runtimes": runtime_markdown, "bench": bench_markdown},
    "docs/operators.md": {"every operator": operator_page},
    "docs/scale.md": {"batch": batch_markdown},
}


def current(page: str, text: str) -> str:
    """A page's text with its tables as they should be.

    Raises:
        ValueError: markers are missing or in the wrong order.
    """
    for name, table in TABLES[page].items():
        opening, closing = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, begin, rest = text.partition(opening)
        _, end, after = rest.partition(closing)
        if not begin or not end:
            raise ValueError(f"{page} holds no table between {opening} and {closing}")
        text = f"{before}{opening}\n\n{table()}\n\n{closing}{after}"
    return text


def main(arguments: list[str]) -> int:
    for page in TABLES:
        path = PAGES / page
        text = path.read_text(encoding="utf-8")
        try:
            wanted = current(page, text)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        if text != wanted and arguments == ["--check"]:
            print(f"the tables of {page} are stale: python tools/readme_table.py", file=sys.stderr)
            return 1
        if text != wanted:
            path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
