"""Linear layers: the gradient for the data input reads the weight in the other direction.

How a convolution's gradient is spelled depends on where it shall run: `lower.py` knows, the rules here do not.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxgbp.broadcast import unbroadcast
from onnxgbp.emit import Emit, dims_of
from onnxgbp.step import Step
from onnxgbp.vjps.entry import inputs, variadic
from onnxgbp.window import Window, window

__all__ = ["VJPS"]


def conv_x(op: Emit, s: Step) -> ir.Value:
    """The transpose of the convolution, cut to the size of x."""
    w, group = s.input(1), _groups(s)
    return op.private("ConvGrad", s.dy, w, s.x, like=s.x, window=window(s, dims_of(w)), group=group)


def _groups(s: Step) -> int:
    """The groups of a convolution, whose weight fits its input."""
    w = s.input(1)
    if dims_of(w) is not None and s.rank(w) != s.rank():
        raise s.refuse(f"its weight '{w.name}' has {s.rank(w)} axes and its input {s.rank()}; the model is not valid")
    group, outputs = int(s.argument("group")), (dims_of(w) or (None,))[0]
    if group < 1 or (isinstance(outputs, int) and (outputs % group or not outputs)):
        raise s.refuse(
            f"its {outputs or 'unknown'} outputs cannot be split into {group} groups; the model is not valid"
        )
    return group


def conv_transpose_x(op: Emit, s: Step) -> ir.Value:
    """ConvTranspose is the transpose of a Conv, so its gradient is that Conv."""
    w, group = s.input(1), _groups(s)
    geometry = window(s, dims_of(w), transposed=True)
    pads = geometry.pads
    if pads is None:
        raise s.refuse("its padding depends on a free dim; export the model with a fixed input size")
    return op.Conv(
        s.dy,
        w,
        strides=geometry.strides,
        dilations=geometry.dilations,
        pads=pads,
        group=group,
    )


def conv_w(op: Emit, s: Step) -> ir.Value:
    return _conv_weight(op, s, s.x, s.dy, window(s, dims_of(s.input(1))))


def conv_transpose_w(op: Emit, s: Step) -> ir.Value:
    """Its weight is that of a Conv from y to x."""
    return _conv_weight(op, s, s.dy, s.x, window(s, dims_of(s.input(1)), transposed=True))


def conv_b(op: Emit, s: Step) -> ir.Value:
    return op.ReduceSum(s.dy, axes=[0, *range(2, s.rank())], keepdims=0)


def _conv_weight(op: Emit, s: Step, image: ir.Value, result: ir.Value, geometry: Window) -> ir.Value:
    """dW[m, c, t] = sum over n and i of result[n, m, i] image[n, c, stride i + dilation t - pad].

    A Conv whose channels are the samples, with strides and dilations exchanged. Only of a weight that is computed from
    the explained input, as in dynamic convolutions.
    """
    dims, pads, group = dims_of(s.input(1)), geometry.pads, _groups(s)
    channels = dims[1] if dims is not None else None
    if pads is None or not isinstance(channels, int):
        raise s.refuse("its weight is computed, and its sizes or its padding are not known; export it with fixed sizes")
    spatial = list(range(2, s.rank()))
    swap = [1, 0, *spatial]
    if group > 1:  # [N, group channels, ...] as [channels, group N, ...]
        sizes = [op.dim(image, axis) for axis in spatial]
        split = op.Reshape(image, op.vector(0, group, channels, *sizes))
        turned = op.Transpose(split, perm=[2, 1, 0, *(axis + 1 for axis in spatial)])
        by_channel = op.Reshape(turned, op.vector(channels, -1, *sizes))
    else:
        by_channel = op.Transpose(image, perm=swap)
    product = op.Conv(
        by_channel,
        op.Transpose(result, perm=swap),
        strides=geometry.dilations,
        dilations=geometry.strides,
        pads=pads,
        group=group,
    )
    # What no window of a stride reached is left over at the end.
    kept = op.Slice(product, starts=[0] * len(spatial), ends=geometry.kernel, axes=spatial)
    return op.Transpose(kept, perm=swap)


def col2im_x(op: Emit, s: Step) -> ir.Value:
    """Col2Im adds columns up where they came from, so that its gradient cuts dy into columns: a one-hot Conv."""
    block = s.ints("block_shape")
    if block is None:
        raise s.refuse("its block_shape is missing")
    image = [op.dim(s.y, axis) for axis in range(2, s.rank(s.y))]
    size = math.prod(block)
    op.sized(size, size)
    kernel = op.like(np.eye(size).reshape(size, 1, *block), s.dy)
    given = {name: s.ints(name) for name in ("dilations", "pads", "strides")}
    columns = op.Conv(op.Reshape(s.dy, op.vector(-1, 1, *image)), kernel, **given)  # [N C, block, columns...]
    return op.reshape_like(columns, s.x)


def gemm_a(op: Emit, s: Step) -> ir.Value:
    """Y = alpha A' B' + beta C, so dA' = alpha dY B'^T; the flags say whether A' and B' are transposed."""
    b, flipped = s.input(1), int(s.argument("transB"))
    if s.argument("transA"):
        return _scaled(op, s, op.MatMul(_transposed(op, b, 2) if flipped else b, _transposed(op, s.dy, 2)))
    return _scaled(op, s, op.MatMul(s.dy, b if flipped else _transposed(op, b, 2)))


def gemm_b(op: Emit, s: Step) -> ir.Value:
    a, flipped = s.input(0), int(s.argument("transA"))
    if s.argument("transB"):
        return _scaled(op, s, op.MatMul(_transposed(op, s.dy, 2), _transposed(op, a, 2) if flipped else a))
    return _scaled(op, s, op.MatMul(a if flipped else _transposed(op, a, 2), s.dy))


def _scaled(op: Emit, s: Step, gradient: ir.Value) -> ir.Value:
    alpha = float(s.argument("alpha"))
    return gradient if alpha == 1 else op.Mul(gradient, alpha)


def gemm_c(op: Emit, s: Step) -> ir.Value:
    return op.Mul(unbroadcast(op, s.dy, dims_of(s.y), s.input(2)), float(s.argument("beta")))


def matmul_a(op: Emit, s: Step) -> ir.Value:
    """DA = dY B^T, summed over the batch dims in which A was broadcast."""
    b, dy = _matrices(op, s)[1:]
    return _fold_batch(op, s, op.MatMul(dy, _transposed(op, b, max(s.rank(s.input(1)), 2))), 0)


def matmul_b(op: Emit, s: Step) -> ir.Value:
    a, _, dy = _matrices(op, s)
    return _fold_batch(op, s, op.MatMul(_transposed(op, a, max(s.rank(s.input(0)), 2)), dy), 1)


def _matrices(op: Emit, s: Step) -> tuple[ir.Value, ir.Value, ir.Value]:
    """A, B and dY with the dim of size 1 that MatMul adds to a vector written out."""
    a, b, dy = s.input(0), s.input(1), s.dy
    if s.rank(b) == 1:
        b, dy = op.Unsqueeze(b, axes=[1]), op.Unsqueeze(dy, axes=[s.rank(s.y)])
    if s.rank(a) == 1:
        # With a vector B as well dY is a scalar made a vector above, and this makes it a matrix.
        a, dy = op.Unsqueeze(a, axes=[0]), op.Unsqueeze(dy, axes=[max(s.rank(s.y) - 1, 0)])
    return a, b, dy


def _transposed(op: Emit, value: ir.Value, rank: int) -> ir.Value:
    perm = list(range(rank))
    perm[-2:] = perm[-1], perm[-2]
    return op.Transpose(value, perm=perm)


def _fold_batch(op: Emit, s: Step, gradient: ir.Value, index: int) -> ir.Value:
    """Sums over broadcast batch dims; the matrix dims are right already."""
    like, other = s.input(index), s.input(1 - index)
    own, rest = dims_of(like) or (), dims_of(other) or ()
    if len(own) == 1:
        # The gradient is [batch..., 1, k] or [batch..., k, 1], with the batch of the other operand.
        axes = list(range(len(rest) - 2))
        return op.reshape_like(op.ReduceSum(gradient, axes=axes, keepdims=0) if axes else gradient, like)
    batch = own[:-2] if len(rest) == 1 else (dims_of(s.y) or ())[:-2]
    return unbroadcast(op, gradient, batch + own[-2:], like)


def einsum(op: Emit, s: Step, index: int) -> ir.Value:
    """The gradient for one operand is an einsum of dy with the others; an index that it alone had is spread out.

    An index that stands twice in an operand reads its diagonal: the gradient goes there, and is 0 beside it.
    """
    terms, result, stretched = _terms(s)
    x, mine = s.input(index), terms[index]
    others = [(s.input(i), term, stretched[i]) for i, term in enumerate(terms) if i != index]
    operands = [op.Squeeze(value, axes=axes) if axes else value for value, _, axes in others]
    left = [_without(term, axes) for _, term, axes in others]
    own = _without(mine, stretched[index])
    found = "".join(letter for letter in dict.fromkeys(own) if letter in result or any(letter in t for t in left))
    gradient = op.Einsum(s.dy, *operands, equation=f"{','.join([result, *left])}->{found}")
    repeated = [axis for axis, letter in enumerate(mine) if letter in mine[:axis]]
    lonely = [axis for axis, letter in enumerate(mine) if letter not in found or axis in repeated]
    lonely = sorted({*lonely, *stretched[index]})
    if not lonely:
        return gradient
    gradient = op.typed(op.Expand(op.Unsqueeze(gradient, axes=lonely), op.shape(x)), x)
    for axis in repeated:
        diagonal = op.Equal(op.positions(x, axis), op.positions(x, mine.index(mine[axis])))
        gradient = op.Where(diagonal, gradient, op.like(0, gradient))
    return gradient


def _without(term: str, axes: Sequence[int]) -> str:
    return "".join(letter for axis, letter in enumerate(term) if axis not in axes)


def _terms(s: Step) -> tuple[list[str], str, list[list[int]]]:
    """The letters of each operand and of the result, '...' as letters too; the axes in which '...' was broadcast."""
    equation = str(s.argument("equation")).replace(" ", "")
    left, arrow, result = equation.partition("->")
    terms = left.split(",")
    if not arrow:  # the dims of '...' come first, then each letter that stands once
        once = sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1)
        result = "..." * ("..." in left) + "".join(once)
    stretched: list[list[int]] = [[] for _ in terms]
    if "..." not in left:
        return terms, result, stretched
    counts = [s.rank(s.input(i)) - len(term.replace("...", "")) for i, term in enumerate(terms)]
    fresh = [letter for letter in string.ascii_letters if letter not in equation]
    letters = "".join(fresh[: max(n for n, term in zip(counts, terms, strict=True) if "..." in term)])
    sizes: dict[str, list[tuple[int | str | None, int, int]]] = {letter: [] for letter in letters}
    for i, term in enumerate(terms):
        if "..." not in term:
            continue
        start, own = term.index("..."), letters[len(letters) - counts[i] :]
        for place, letter in enumerate(own):
            sizes[letter].append(((dims_of(s.input(i)) or ())[start + place], i, start + place))
        terms[i] = term.replace("...", own)
    for found in sizes.values():
        wide = {dim for dim, _, _ in found} - {1}
        if len(wide) > 1 or None in wide:
            raise s.refuse(f"whether the free dims behind '...' of its equation '{equation}' are alike is not known")
        for dim, i, axis in found:
            if wide and dim == 1:
                stretched[i].append(axis)
    return terms, result.replace("...", letters), stretched


_LARGEST_MATRIX = 24  # the minors of one matrix hold n^2 (n - 1)^2 numbers


def det_x(op: Emit, s: Step) -> ir.Value:
    """dX = dy cof(X): each cofactor is the determinant of X without one row and column, up to its sign.

    Unlike det(X) inverse(X)', for which the standard has no operator, it is right for a singular matrix as well.
    """
    size = (dims_of(s.x) or (None,))[-1]
    if not isinstance(size, int) or size > _LARGEST_MATRIX:
        raise s.refuse(f"its matrices have {size or '?'} rows, for which {_LARGEST_MATRIX} are the most")
    dy = op.Unsqueeze(s.dy, axes=[s.rank() - 2, s.rank() - 1])
    if size == 1:
        return op.expand_like(dy, s.x)
    kept = [[i for i in range(size) if i != left_out] for left_out in range(size)]
    minors = np.array([np.add.outer(np.multiply(rows, size), columns) for rows in kept for columns in kept])
    entries = op.Reshape(s.x, op.vector(*([0] * (s.rank() - 2)), size * size))
    cofactors = op.Reshape(op.Det(op.Gather(entries, minors, axis=s.rank() - 2)), op.shape(s.x))
    signs = (-1.0) ** np.add.outer(np.arange(size), np.arange(size))
    return op.Mul(op.Mul(cofactors, op.like(signs, s.x)), dy)


VJPS = {
    "Col2Im": inputs(col2im_x),
    "Conv": inputs(conv_x, conv_w, conv_b),
    "ConvTranspose": inputs(conv_transpose_x, conv_transpose_w, conv_b),
    "Det": inputs(det_x),
    "Einsum": variadic(einsum),
    "Gemm": inputs(gemm_a, gemm_b, gemm_c),
    "MatMul": inputs(matmul_a, matmul_b),
}
