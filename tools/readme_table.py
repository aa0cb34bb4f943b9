"""Writes the table of operators into the README, between its two marker comments.

python tools/readme_table.py           rewrites it
python tools/readme_table.py --check   exit 1 where it is stale, and changes nothing
"""

from __future__ import annotations

import sys
from pathlib import Path

from onnxgbp.inspection import operator_markdown

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- operators:begin -->", "<!-- operators:end -->"


def current(text: str) -> str:
    """The README's text with the table as it should be.

    Raises:
        ValueError: the markers are missing or in the wrong order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md holds no table between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{operator_markdown()}\n\n{END}{after}"


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
        print("the README's table of operators is stale: python tools/readme_table.py", file=sys.stderr)
        return 1
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
