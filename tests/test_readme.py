"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

import onnxgbp
from onnxgbp.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent


def test_python_example(squeezenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert all(len([line for line in example.splitlines() if line]) <= 10 for example in examples)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / squeezenet.name).symlink_to(squeezenet)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    del onnxgbp.RULES["half"]  # the second example registers it
    result = names["result"]
    assert result.attribution.shape == (2, 3, 224, 224)  # type: ignore[attr-defined]  # an Explanation, but exec tells no types
    assert result.target.tolist() == [285, 281]  # type: ignore[attr-defined]  # as above
    assert {path.name for path in tmp_path.glob("squeezenet.*.onnx")} == {
        "squeezenet.guided.onnx",
        "squeezenet.gradient.onnx",
        "squeezenet.half.onnx",
    }


def test_every_method_is_explained() -> None:
    readme = (ROOT / "README.md").read_text()
    for method in [*onnxgbp.RULES, *filter(None, METHODS)]:
        assert re.search(rf"^\| .*`{method}`", readme, flags=re.MULTILINE), method
