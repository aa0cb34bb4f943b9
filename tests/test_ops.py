"""The table of operators: complete, free of contradictions, and current in the README."""

import json

import onnx
import pytest
import readme_table
from click.testing import CliRunner

from onnxgbp.activations import ACTIVATIONS
from onnxgbp.cli import main
from onnxgbp.inspection import operator_markdown, operator_table, operator_text
from onnxgbp.vjps import FAMILIES, VJPS, ZERO_GRADIENT

FORMS = {"Relu6", "GeluTanh", "QuantizedRelu"}  # of other operators: activations, but no operators


@pytest.mark.parametrize("name", sorted({*VJPS, *ACTIVATIONS, *ZERO_GRADIENT} - FORMS))
def test_every_entry_is_an_operator(name: str) -> None:
    domain, _, operator = name.rpartition("::")
    if domain.startswith("com.microsoft"):
        pytest.skip("its schema stands in ONNX Runtime, not in onnx")
    assert onnx.defs.has(operator, domain=domain)


def test_no_operator_is_both_differentiable_and_of_zero_gradient() -> None:
    assert not (set(VJPS) | set(ACTIVATIONS)) & ZERO_GRADIENT


def test_no_operator_stands_in_two_families() -> None:
    assert sum(map(len, FAMILIES.values())) == len(VJPS)


def test_rows() -> None:
    rows = {(row["family"], row["operator"]): row for row in operator_table()}
    conv = rows["linear", "Conv"]
    assert conv["differentiated"] == ["X"]
    assert conv["opsets"].startswith("7-")
    assert conv["domain"] == "ai.onnx"
    assert rows["linear", "Gemm"]["differentiated"] == ["A", "B", "C"]
    assert rows["shape", "Concat"]["differentiated"] == ["inputs..."]
    assert rows["activation", "Relu6"]["opsets"] == ""
    assert "negative" in rows["activation", "Gelu"]["note"]
    assert rows["zero gradient", "Shape"]["differentiated"] == []


def test_both_outputs_hold_every_operator() -> None:
    text = CliRunner().invoke(main, ["ops"])
    rows = json.loads(CliRunner().invoke(main, ["ops", "--json"]).stdout)
    assert text.exit_code == 0
    assert text.stdout == operator_text() + "\n"
    assert rows == operator_table()
    assert len(text.stdout.splitlines()) == len(rows) + 1
    for row in rows:
        assert row["operator"] in operator_markdown()


def test_readme_is_current() -> None:
    text = readme_table.README.read_text(encoding="utf-8")
    assert text == readme_table.current(text), "python tools/readme_table.py"


def test_a_stale_table_is_noticed_and_rewritten(tmp_path, monkeypatch, capsys) -> None:
    readme = tmp_path / "README.md"
    tables = "\n".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->" for name in readme_table.TABLES)
    readme.write_text(f"before\n{tables}\nafter\n")
    monkeypatch.setattr(readme_table, "README", readme)
    assert readme_table.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert readme_table.main([]) == 0
    assert readme_table.main(["--check"]) == 0
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")
    assert "MaxPool" in readme.read_text()
    assert "| ONNX Runtime |" in readme.read_text()
    assert "old\n" not in readme.read_text()


def test_a_readme_without_markers_is_refused(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "README.md").write_text("nothing")
    monkeypatch.setattr(readme_table, "README", tmp_path / "README.md")
    assert readme_table.main([]) == 1
    assert "operators:begin" in capsys.readouterr().err
