"""The geometry of convolutions and pools: kernel, strides, dilations, and the pads that `auto_pad` stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from onnxgbp.emit import Dims, dims_of
from onnxgbp.step import Step

__all__ = ["Window", "window"]


@dataclasses.dataclass(frozen=True)
class Window:
    """One window per spatial dim.

    pads: all begins, then all ends; None where `auto_pad` and a free dim leave them to the run.
    upper: with such pads, whether the odd one goes to the end.
    size, out: the spatial dims of x and y; an int where they are static.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[int] | None
    upper: bool
    size: Dims
    out: Dims

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def reach(self) -> list[int]:
        """How many elements a dilated kernel spans."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    @property
    def static(self) -> bool:
        return self.pads is not None and all(isinstance(dim, int) for dim in (*self.size, *self.out))

    @property
    def whole(self) -> bool:
        """One window that is the whole input, as in a global pool."""
        return (
            self.static and not any(self.pads or ()) and tuple(self.kernel) == self.size and set(self.dilations) == {1}
        )

    def span(self, axis: int) -> int:
        """How many padded elements the windows of a static dim cover together."""
        out = self.out[axis]
        assert isinstance(out, int)  # asked of static windows alone
        return (out - 1) * self.strides[axis] + self.reach[axis]


def window(step: Step, weight: Dims | None = None, *, transposed: bool = False) -> Window:
    """Reads the geometry of a Conv, ConvTranspose or pooling node; a weight gives the kernel that no attribute does."""
    kernel = step.ints("kernel_shape")
    if kernel is None:
        if weight is None or not all(isinstance(dim, int) for dim in weight[2:]):
            raise step.refuse("its kernel's size is not known; export the model with a constant weight or kernel_shape")
        kernel = [int(dim) for dim in weight[2:] if dim is not None]
    rank = len(kernel)
    strides = step.ints("strides") or [1] * rank
    dilations = step.ints("dilations") or [1] * rank
    x, y = dims_of(step.x), dims_of(step.y)
    size: Dims = x[2:] if x is not None else (None,) * rank
    out: Dims = y[2:] if y is not None else (None,) * rank
    auto = str(step.argument("auto_pad") or "NOTSET")
    pads: list[int] | None = step.ints("pads") or [0] * (2 * rank)
    if transposed and (auto.startswith("SAME") or step.ints("output_shape")):
        pads = _pads_of_transpose(step, kernel, strides, dilations, size, out, auto)
    elif auto.startswith("SAME"):
        pads = _same_pads(kernel, strides, dilations, size, auto == "SAME_UPPER")
    elif auto == "VALID":
        pads = [0] * (2 * rank)
    return Window(kernel, strides, dilations, pads, auto == "SAME_UPPER", size, out)


def _same_pads(
    kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], size: Dims, upper: bool
) -> list[int] | None:
    begins, ends = [], []
    for k, s, d, x in zip(kernel, strides, dilations, size, strict=True):
        reach = (k - 1) * d + 1
        if isinstance(x, int):
            total = max((-(-x // s) - 1) * s + reach - x, 0)
        elif s == 1:
            total = reach - 1  # whatever the size
        else:
            return None
        begins.append(total // 2 if upper else total - total // 2)
        ends.append(total - begins[-1])
    return begins + ends


def _pads_of_transpose(
    step: Step, kernel: list[int], strides: list[int], dilations: list[int], size: Dims, out: Dims, auto: str
) -> list[int] | None:
    """The standard: total = s (x - 1) + output_padding + reach - y; UPPER puts the smaller half first."""
    extra = step.ints("output_padding") or [0] * len(kernel)
    begins, ends = [], []
    for k, s, d, x, y, more in zip(kernel, strides, dilations, size, out, extra, strict=True):
        if not isinstance(x, int) or not isinstance(y, int):
            return None
        total = max(s * (x - 1) + more + (k - 1) * d + 1 - y, 0)
        begins.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
        ends.append(total - begins[-1])
    return begins + ends
