"""One forward node as a rule sees it: its tensors, its arguments, and the gradients that arrive at its outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxgbp.constants import constant_value
from onnxgbp.errors import OnnxgbpError, OpsetTooLowError

__all__ = ["Step", "label", "trusting"]


def label(node: ir.Node) -> str:
    """The name by which people and `--rule` patterns know a node; exporters may leave it empty."""
    return node.name or f"{node.op_type}({node.outputs[0].name})"


@contextlib.contextmanager
def trusting(name: str) -> Iterator[None]:
    """A rule takes the node called so to be as the standard says. Where a file breaks that, it fails in many ways, and
    each means the same to a user.
    """
    try:
        yield
    except (OnnxgbpError, OpsetTooLowError):
        raise
    except MemoryError as error:
        raise OnnxgbpError(f"the gradient of node '{name}' takes more memory than there is") from error
    except Exception as error:
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise OnnxgbpError(
            f"the gradient of node '{name}' cannot be written; is the node as the standard defines it? ({said})"
        ) from error


@functools.cache
def _schema(op_type: str, opset: int, domain: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


@dataclasses.dataclass
class Step:
    """A node of the forward graph; `dys` holds the gradient of each output, None where none arrives."""

    node: ir.Node
    dys: Sequence[ir.Value | None] = ()

    @property
    def x(self) -> ir.Value:
        return self.input(0)

    @property
    def y(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def dy(self) -> ir.Value:
        dy = self.dys[0]
        if dy is None:
            raise self.refuse("only a secondary output of it is explained, which has no gradient rule")
        return dy

    def input(self, index: int) -> ir.Value:
        value = self.node.inputs[index] if index < len(self.node.inputs) else None
        if value is None:
            raise self.refuse(f"input {index} is missing")
        return value

    def has(self, index: int) -> bool:
        return index < len(self.node.inputs) and self.node.inputs[index] is not None

    def argument(self, name: str) -> Any:
        """An argument by its name in the standard, whether this opset takes it as an attribute or as an input.

        Returns its Python or numpy value, the schema's default, or None where it is optional and absent.
        """
        value = self.tensor(name)
        if value is None:
            return self._attribute(name)
        known = constant_value(value)
        if known is None:
            raise self.refuse(f"its argument '{name}' is computed while the model runs")
        return known.item() if known.ndim == 0 else known

    def ints(self, name: str) -> list[int] | None:
        argument = self.argument(name)
        if argument is None:
            return None
        if np.ndim(argument) > 1:
            raise self.refuse(f"its argument '{name}' is no list of numbers")
        return [int(v) for v in np.ravel(argument)]

    def tensor(self, name: str) -> ir.Value | None:
        """An argument that this opset takes as an input; None where it is an attribute or absent."""
        schema = self._schema()
        names = [formal.name for formal in schema.inputs] if schema else []
        index = names.index(name) if name in names else len(self.node.inputs)
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def axis(self, default_rank_of: ir.Value | None = None) -> int:
        """The argument `axis`, counted from the front."""
        axis = int(self.argument("axis"))
        return axis + self.rank(default_rank_of) if axis < 0 else axis

    def rank(self, value: ir.Value | None = None) -> int:
        value = self.x if value is None else value
        if value.shape is None:
            raise self.refuse(f"the rank of tensor '{value.name}' is not known; export the model with input shapes")
        return len(value.shape)

    def refuse(self, why: str) -> OnnxgbpError:
        return OnnxgbpError(f"no gradient for operator {self.node.op_type} (node '{label(self.node)}'): {why}")

    @property
    def since(self) -> int:
        """The opset that last changed this operator, as of the model's opset."""
        schema = self._schema()
        return schema.since_version if schema else 0

    def _schema(self) -> onnx.defs.OpSchema | None:
        graph = self.node.graph
        assert graph is not None  # a forward node stands in a graph
        domain = self.node.domain
        return _schema(self.node.op_type, graph.opset_imports.get(domain, 1), domain)

    def _attribute(self, name: str) -> Any:
        if name in self.node.attributes:
            value = self.node.attributes[name].value
            return value.decode() if isinstance(value, bytes) else value
        schema = self._schema()
        if schema is None or name not in schema.attributes:
            return None
        default = (
            onnx.helper.get_attribute_value(schema.attributes[name].default_value)
            if schema.attributes[name].default_value.name
            else None
        )
        return default.decode() if isinstance(default, bytes) else default
