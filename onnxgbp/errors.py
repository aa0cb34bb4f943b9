"""What a user is told when something cannot be done."""

from __future__ import annotations

__all__ = ["OnnxgbpError"]


class OnnxgbpError(ValueError):
    """A model, an option or an array that cannot be used: one line saying what, where, and the way out."""


class OpsetTooLowError(Exception):
    """A gradient that the source's opset cannot spell; `convert` answers by raising the opset."""

    def __init__(self, opset: int) -> None:
        super().__init__(opset)
        self.opset = opset
