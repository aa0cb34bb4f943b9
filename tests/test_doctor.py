"""`doctor`: what is installed, what works, and one line for each fault. Whole environments are in test_packaging.py."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import onnxruntime
import pytest
from click.testing import CliRunner

import onnxgbp
from onnxgbp import OnnxgbpError, doctor
from onnxgbp.cli import main
from onnxgbp.installed import onnxruntime_distributions, onnxruntime_module

# What a runtime must have to be asked; `body` is what happens when a session is made.
SHIM = """
import os
class SessionOptions:
    def add_session_config_entry(self, *_): pass
class InferenceSession:
    def __init__(self, *_, **__): {body}
    def get_providers(self): return ["CPUExecutionProvider"]
    def run(self, *_): return [0]
"""


def test_a_healthy_installation() -> None:
    found = doctor.diagnose()
    assert found.passed
    assert found.runtime == onnxruntime.__version__
    assert list(found.distributions.values()) == [onnxruntime.__version__]
    assert found.versions["onnxgbp"] == onnxgbp.__version__
    cpu = next(one for one in found.providers if one.name == "CPUExecutionProvider")
    assert cpu == doctor.Provider("CPUExecutionProvider", works=True, used=True, detail="")
    assert [one.name for one in found.providers] == onnxruntime.get_available_providers()


def test_the_command() -> None:
    text = CliRunner().invoke(main, ["doctor"])
    assert text.exit_code == 0
    assert "nothing is wrong" in text.output
    told = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).output)
    assert told["passed"]
    assert told["onnxruntime"]["version"] == onnxruntime.__version__


def test_cuda_that_is_compiled_in_and_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA may work here")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    (fault,) = (line for line in result.output.splitlines() if line.startswith("FAULT"))
    assert "CUDAExecutionProvider is compiled in and does not work" in fault
    assert "check driver, CUDA and cuDNN" in fault


def test_a_provider_that_onnxgbp_does_not_use_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["NoSuchExecutionProvider"])
    found = doctor.diagnose()
    assert found.passed
    assert not found.providers[0].works
    assert "NoSuchExecutionProvider  does not work (onnxgbp does not use it)" in found.to_text()


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("os.abort()", r"the process ended with status -6"),
        ("os._exit(3)", r"the process ended with status 3: it said nothing"),
        ("pass", r"it computes wrong numbers"),
        ("raise RuntimeError('[ONNXRuntimeError] : 1 : FAIL : no device')", r"^no device$"),
        (
            "import sys; sys.stderr.write('\\x1b[1;31m2026 [E:onnxruntime:Default, x.cc] Failed to load library "
            "a.so with error: libb.so.9: cannot open shared object file: No such file\\x1b[m\\n'); raise OSError('EP')",
            r"^libb\.so\.9: cannot open shared object file",
        ),
    ],
)
def test_a_provider_is_tried_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, detail: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "onnxruntime.py").write_text(SHIM.format(body=body))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    (provider,) = doctor.diagnose().providers
    assert not provider.works
    assert re.search(detail, provider.detail), provider.detail


def test_files_of_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "onnxruntime_distributions", lambda: {"onnxruntime-gpu": "1.2.3+cu13"})
    (fault,) = doctor.diagnose().faults
    assert "onnxruntime-gpu is 1.2.3+cu13, but the files are those of" in fault
    assert "pip install --force-reinstall onnxruntime-gpu" in fault


def test_half_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = onnxruntime_distributions()
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(OnnxgbpError, match=f"{name} cannot be imported .*--force-reinstall {name}"):
        onnxruntime_module()
