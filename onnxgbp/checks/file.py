"""What the file holds: its metadata, its operators, and a forward pass of which nothing has changed."""

from __future__ import annotations

import hashlib

import onnx

from onnxgbp.checks.row import Check, Failed
from onnxgbp.checks.subject import Subject
from onnxgbp.compare import (
    at_opset,
    checker_complaint,
    first_line,
    label_of,
    needed_tensors,
    relative_difference,
    resolution,
    structural_faults,
)
from onnxgbp.model import METADATA
from onnxgbp.opset import opset_of

__all__ = ["facts", "forward_unchanged", "source_file", "standard", "structure"]

STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml"})

# Runtimes fuse differently where more tensors are read: 5e-7 of the range was seen on a residual net.
_FORWARD = 1e-5


def facts(s: Subject) -> str:
    if s.record.missing:
        raise Failed(f"the metadata lacks {', '.join(METADATA + fact for fact in s.record.missing)}")
    known = s.types
    for what in [s.record.said["explained"], *s.record.wrt, *s.record.differentiated]:
        if what not in known:
            raise Failed(f"the metadata names tensor '{what}', which the file does not hold")
    names = [output.name for output in s.proto.graph.output]
    added = [*s.record.results, "attribution_target", *s.record.views]
    if names[-len(added) :] != added:
        raise Failed(f"the outputs should end with {', '.join(added)}, and are {', '.join(names)}")
    for result, name in s.record.results.items():
        if known.get(result) != known[name]:
            raise Failed(f"output '{result}' is not of the type of '{name}'")
    return f"opset {opset_of(s.proto)}, IR {s.proto.ir_version}{_raised(s)}"


def _raised(s: Subject) -> str:
    """What the conversion raised, where it says so; a failure where the source needs no such thing."""
    if s.source_path is None:
        return ""
    source = onnx.load(s.source_path, load_external_data=False)
    opset, version = opset_of(source), source.ir_version
    if opset_of(s.proto) <= opset and s.proto.ir_version <= version:
        return ", as the source"
    fresh = s.record.convert(str(s.source_path))
    if opset_of(s.proto) > opset_of(fresh) or s.proto.ir_version > fresh.ir_version:
        raise Failed(f"opset {opset_of(s.proto)}, IR {s.proto.ir_version} are above the source's {opset}, {version}")
    return f", raised from opset {opset} and IR {version}, since the gradient needs it"


def standard(s: Subject) -> Check:
    faults = [f"local function {function.name}" for function in s.proto.functions]
    forward = {output for node in s.forward.graph.node for output in node.output}
    own = {node.domain for node in s.forward.graph.node if not node.domain.startswith("onnxgbp")}
    needed = needed_tensors(s.proto.graph, [output.name for output in s.proto.graph.output])
    for node in s.proto.graph.node:
        if node.domain not in STANDARD and (node.domain not in own or not forward & set(node.output)):
            faults.append(f"node '{label_of(node)}' is {node.op_type} of domain '{node.domain}'")
        if not needed & set(node.output):
            faults.append(f"nothing needs node '{label_of(node)}'")
    note = ""
    if complaint := checker_complaint(str(s.out)):
        # A source that the checker does not pass cannot be made to pass: not a node of it is changed.
        if checker_complaint(s.forward) is None:
            faults.append(f"onnx.checker: {complaint}")
        else:
            note = f"; onnx.checker does not pass the source either: {complaint}"
    private = sorted(own - STANDARD)
    kept = f", and the source's own of {', '.join(private)}" if private else ""
    said = f"{len(s.proto.graph.node)} nodes{kept}{note}" if not faults else "; ".join(faults[:3])
    return Check("", not faults, said, len(faults), 0)


def source_file(s: Subject) -> str:
    assert s.source_path is not None  # else there is no such row
    found, wanted = hashlib.sha256(s.source_path.read_bytes()).hexdigest(), s.record.said.get("sha256")
    if found != wanted:
        raise Failed(
            f"{s.source_path} is another file: its sha256 is {found[:12]}..., recorded is {str(wanted)[:12]}..."
        )
    return f"sha256 {found[:12]}... as recorded"


def structure(s: Subject) -> Check:
    assert s.source is not None
    assert s.source_path is not None
    faults, count = [], 0
    for fault in structural_faults(at_opset(s.source, s.source_path, opset_of(s.proto)), s.proto):
        count += fault is None
        faults += [fault] if fault else []
    said = f"{count} nodes and weights, bit for bit" if not faults else "; ".join(faults[:3])
    return Check("", not faults, said, len(faults), 0)


def forward_unchanged(s: Subject) -> Check:
    names = [output.name for output in s.proto.graph.output if output.name not in s.added]
    original = s.original_run
    worst, where, batches, tolerance = 0.0, "", [], _FORWARD
    for batch in (1, 3) if s.free_batch else (None,):
        feeds = s.inputs(batch)
        try:
            wanted = original(feeds)
        except Exception as error:  # noqa: BLE001 - a source that only takes the exported batch, for instance
            if batch in (None, 1):
                raise Failed(f"the source does not run: {first_line(error)}") from None
            continue
        found = s.out_run(s.with_extra(feeds))
        batches.append(str(batch or "as fixed"))
        for name in names:
            if name not in wanted:
                raise Failed(f"output '{name}' is none of the source's")
            difference = relative_difference(found[name], wanted[name])
            tolerance = max(tolerance, resolution(wanted[name]))
            if not difference <= worst:
                worst, where = difference, name
    missing = [name for name in wanted if name not in names]
    if missing:
        raise Failed(f"the source's output '{missing[0]}' is gone")
    against = "the source" if s.trusted else "the forward part cut out of the file (no --source was given)"
    said = f"{len(names)} outputs against {against}, batch {' and '.join(batches)}, share of the range"
    return Check("", worst <= tolerance, said + (f", worst '{where}'" if where else ""), worst, tolerance)
