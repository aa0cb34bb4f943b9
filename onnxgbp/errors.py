"""What a user is told when something cannot be done."""

from __future__ import annotations

__all__ = ["OnnxgbpError", "printable"]

_LONGEST = 4000  # characters of a message; a file may name a tensor with a megabyte


def printable(line: str) -> str:
    """One line that a terminal shows and does not obey.

    Names come out of files that anyone may have made. Line breaks in them would forge lines of a report, an escape
    sequence repaints the screen, a bidirectional mark shows a name turned round: each is written as Python escapes it.
    """
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


class OnnxgbpError(ValueError):
    """A model, an option or an array that cannot be used: one line saying what, where, and the way out."""

    def __init__(self, message: str) -> None:
        half = _LONGEST // 2
        short = message if len(message) <= _LONGEST else f"{message[:half]} ... {message[-half:]}"
        super().__init__(printable(short))


class OpsetTooLowError(Exception):
    """A gradient that the source's opset cannot spell; `convert` answers by raising the opset."""

    def __init__(self, opset: int) -> None:
        super().__init__(opset)
        self.opset = opset
