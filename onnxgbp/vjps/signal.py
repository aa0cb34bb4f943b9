"""Fourier transforms. They are linear: the gradient is the transposed matrix, for a short-time one with overlap-add."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxgbp.emit import Emit, dims_of
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs

__all__ = ["VJPS"]


def _waves(bins: int, samples: int, length: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The cosine and sine of 2 pi k t / length, [bins, samples]."""
    angle = 2 * np.pi * np.outer(np.arange(bins), np.arange(samples)) / length
    return np.cos(angle), np.sin(angle)


def dft_x(op: Emit, s: Step) -> ir.Value:
    """Y[k] = sum over t of X[t] exp(-+ 2 pi i k t / length), with the parts of a complex number in the last axis."""
    sizes, outs = dims_of(s.x), dims_of(s.y)
    given = s.argument("axis")
    if sizes is None or outs is None:
        raise s.refuse("the rank of its input is not known; export the model with input shapes")
    axis = int(-2 if given is None else given) % len(sizes)
    size, bins, parts = sizes[axis], outs[axis], sizes[-1]
    if not isinstance(size, int) or not isinstance(bins, int) or not isinstance(parts, int):
        raise s.refuse("it transforms a free dim; export the model with a fixed length")
    inverse, half = bool(s.argument("inverse")), bool(s.argument("inverse") and s.argument("onesided"))
    length = int(s.argument("dft_length") or (bins if half else size))
    if length < 1 or bins < 1:
        raise s.refuse(f"its length is {length}, and it gives {bins} numbers")
    used = min(size, length // 2 + 1 if half else length)  # a longer signal is cut, a shorter one padded with zeros
    matrix = np.zeros(op.sized(bins, 2, size, parts))
    cos, sin = _waves(bins, used, length)
    sign, scale = (1, 1 / length) if inverse else (-1, 1)
    # [bin, part of Y, sample, part of X]: (xr + i xi) (cos + i sign sin)
    matrix[:, 0, :used, 0], matrix[:, 1, :used, 0] = cos, sign * sin
    if parts == 2:
        matrix[:, 0, :used, 1], matrix[:, 1, :used, 1] = -sign * sin, cos
    if half:  # the real signal behind half a spectrum: each bin stands for its mirror image too, but 0 and the middle
        twice = [1 if k == 0 or 2 * k == length else 2 for k in range(used)]
        matrix[:, :, :used] *= np.array(twice)[:, None]
        matrix = matrix[:, :1]
    rank, results = len(sizes), matrix.shape[1]
    order = [i for i in range(rank - 1) if i != axis] + [axis, rank - 1]
    lead = [0] * (rank - 2)  # 0 copies the dim
    flat = op.Reshape(op.Transpose(s.dy, perm=order), [*lead, bins * results])
    back = op.MatMul(flat, op.like(scale * matrix.reshape(bins * results, size * parts), s.x))
    return op.Transpose(op.Reshape(back, [*lead, size, parts]), perm=[order.index(i) for i in range(rank)])


def stft_x(op: Emit, s: Step) -> ir.Value:
    """Each frame's transform is a convolution with windowed waves, so the gradient is that convolution's transpose."""
    if "onesided" not in s.node.attributes:  # ONNX Runtime then computes one side and believes in two
        raise s.refuse("it does not say whether it is onesided, which onnx and runtimes read in different ways: say it")
    hop, window = s.argument("frame_step"), s.argument("window")
    outs, sizes = dims_of(s.y), dims_of(s.x)
    length = s.argument("frame_length")
    if length is None and window is not None:
        length = len(window)
    bins = outs[2] if outs is not None else None
    if hop is None or length is None or not isinstance(bins, int) or sizes is None:
        raise s.refuse("its frame length or number of bins is not known; export the model with constants")
    if len(sizes) == 3 and sizes[2] != 1:
        raise s.refuse("its signal is complex, for which there is no rule")
    op.sized(2 * bins, int(length))
    shape = np.ones(int(length)) if window is None else np.asarray(window, np.float64)
    if len(shape) != int(length):
        raise s.refuse("its window is not as long as a frame")
    cos, sin = _waves(bins, int(length), int(length))
    kernel = np.stack([cos * shape, -sin * shape], axis=1).reshape(2 * bins, 1, int(length))
    frames = op.Reshape(op.Transpose(s.dy, perm=[0, 2, 3, 1]), [0, 2 * bins, -1])
    spread = op.ConvTranspose(frames, op.like(kernel, s.x), strides=[int(hop)], output_padding=[int(hop) - 1])
    # The samples behind the last whole frame have no gradient; output_padding made at least as many zeros.
    return op.reshape_like(op.Slice(spread, starts=[0], ends=op.dim(s.x, 1), axes=[2]), s.x)


VJPS = {
    "DFT": inputs(dft_x),
    "STFT": inputs(stft_x),
}
