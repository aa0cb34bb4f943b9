"""The README's example runs as it stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_python_example(squeezenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 10
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / squeezenet.name).symlink_to(squeezenet)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    result = names["result"]
    assert result.attribution.shape == (2, 3, 224, 224)  # type: ignore[attr-defined]  # an Explanation, but exec tells no types
    assert result.target.tolist() == [285, 281]  # type: ignore[attr-defined]  # as above
    assert (tmp_path / "squeezenet.guided.onnx").is_file()


def test_every_method_is_explained() -> None:
    import onnxgbp.rules

    readme = (ROOT / "README.md").read_text()
    for method in onnxgbp.rules.RULES:
        assert f"| `{method}` |" in readme
