"""The files of the portable profile in other runtimes; see runtimes/run.py, which also runs the slow ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from environments import NotInstalledError
from runtimes.cases import Case, cases
from runtimes.run import LARGEST_ERROR, RUNTIMES, judged, largest_error, run

QUICK = [name for name, runtime in RUNTIMES.items() if runtime.quick and not runtime.known]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runtimes")


@pytest.fixture(scope="session")
def given(squeezenet: Path, folder: Path) -> list[Case]:
    return list(cases(folder))


def results_of(name: str, given: list[Case], folder: Path) -> dict[str, dict]:
    """By the case's name; skips where the runtime cannot be had, and says why."""
    try:
        return run(RUNTIMES[name], given, folder)["cases"]
    except NotInstalledError as error:
        pytest.skip(f"{name} is not installed: {error}")


@pytest.mark.parametrize("name", QUICK)
def test_one_file_is_right_everywhere(name: str, given: list[Case], folder: Path) -> None:
    results = results_of(name, given, folder)
    assert {case.name: judged(case, results[case.name])["status"] for case in given} == {
        case.name: "ok" for case in given
    }


def tied(case: Case, folder: Path) -> Case:
    """The case with -(-W) written as W: one weight for both directions, as the profile `ort` has it."""
    model = onnx.load(case.model)
    weights = {tensor.name for tensor in model.graph.initializer}
    once = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Neg"}
    twice = {made: once[half] for made, half in once.items() if once.get(half) in weights}
    assert twice
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = twice.get(name, name)
    path = folder / f"tied-{case.model.name}"
    onnx.save(model, path)
    return dataclasses.replace(case, model=path)


def test_openvino_needs_untied_weights(given: list[Case], folder: Path) -> None:
    """Why the portable profile unties weights. Should the first assertion fail, OpenVINO has mended its fault."""
    case = next(case for case in given if case.name == "pools-gradient-3")
    result = results_of("openvino", [tied(case, folder)], folder)[case.name]
    assert judged(case, result)["status"].startswith("wrong: the attribution is off")
    assert largest_error(result["outputs"]["y"], case.wanted["y"]) <= LARGEST_ERROR, "in silence: the scores are right"
    # Right elsewhere, so it is the runtime that is wrong and not the file.
    other = results_of("onnxruntime", [tied(case, folder)], folder)[case.name]
    assert judged(case, other)["status"] == "ok"


def test_openvino_computes_in_bfloat16_unless_asked(given: list[Case], folder: Path) -> None:
    """Where the CPU has bfloat16 the maps are coarse by default; where it has not, nothing needs to be asked."""
    results = results_of("openvino-default", given, folder)
    narrow = "bf16" in Path("/proc/cpuinfo").read_text()
    statuses = {judged(case, results[case.name])["status"].partition(":")[0] for case in given}
    assert statuses == ({"wrong"} if narrow else {"ok"})


def test_the_answers_tell_right_from_wrong(given: list[Case]) -> None:
    """A map of another method or sample is found to be wrong, and so is a scaled one."""
    case, *others = (case for case in given if case.net == "pools" and case.batch == 3)
    right = {"outputs": {name: x.astype(np.float32) for name, x in case.wanted.items()}}
    assert judged(case, right)["status"] == "ok"
    for wrong in (*(other.wanted["attribution"] for other in others), 1.001 * case.wanted["attribution"]):
        assert judged(case, {"outputs": right["outputs"] | {"attribution": wrong}})["status"].startswith("wrong")
    rolled = {name: np.roll(x, 1, axis=0) for name, x in right["outputs"].items()}
    assert "another class" in judged(case, {"outputs": rolled})["status"]


def test_every_case_was_run_everywhere() -> None:
    """tests/runtimes.json has a row for each runtime, net, batch and method, or says why not."""
    rows = json.loads((Path(__file__).parent / "runtimes.json").read_text())
    for name in RUNTIMES:
        mine = [row for row in rows if row["runtime"] == name]
        combinations = {(row["net"], row["batch"], row["method"]) for row in mine if row["version"]}
        assert len(combinations) == 12 or [row["status"][:13] for row in mine] == ["not installed"], name
