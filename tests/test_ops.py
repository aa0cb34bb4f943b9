"""The table of operators: complete, free of contradictions, and current in the README."""

import json

import onnx
import pytest
import readme_table
from click.testing import CliRunner

from onnxgbp.activations import ACTIVATIONS
from onnxgbp.cli import main
from onnxgbp.contrib import CONTRIB
from onnxgbp.operators import operator_markdown, operator_table, operator_text
from onnxgbp.vjps import FAMILIES, REFUSED, VJPS, ZERO_GRADIENT

FORMS = {"Relu6", "GeluTanh", "QuantizedRelu"}  # of other operators: activations, but no operators


@pytest.mark.parametrize("name", sorted({*VJPS, *ACTIVATIONS, *ZERO_GRADIENT, *REFUSED} - FORMS))
def test_every_entry_is_an_operator(name: str) -> None:
    domain, _, operator = name.rpartition("::")
    if domain.startswith("com.microsoft"):
        pytest.skip("its schema stands in ONNX Runtime, not in onnx")
    assert onnx.defs.has(operator, domain=domain)


def test_no_operator_is_known_in_two_ways() -> None:
    assert set(VJPS) & set(ACTIVATIONS) == {"Clip"}  # it has bounds, which an activation's derivative does not see
    assert not (set(VJPS) | set(ACTIVATIONS)) & ZERO_GRADIENT
    assert not (set(VJPS) | set(ACTIVATIONS) | ZERO_GRADIENT | set(CONTRIB)) & set(REFUSED)


FLOATS = {f"tensor({name})" for name in ("float", "float16", "bfloat16", "double")}
FLOATS |= {f"{outer}({inner})" for outer in ("seq", "optional") for inner in FLOATS}


def _newest() -> dict[str, onnx.defs.OpSchema]:
    newest = {}
    for schema in sorted(onnx.defs.get_all_schemas_with_history(), key=lambda schema: schema.since_version):
        newest[f"{schema.domain}::{schema.name}" if schema.domain else schema.name] = schema
    return newest


def _carries(formals) -> bool:
    return any(FLOATS & set(formal.types) for formal in formals)


@pytest.mark.parametrize("name", [n for n, s in _newest().items() if _carries(s.inputs) and _carries(s.outputs)])
def test_every_operator_of_floats_is_known(name: str) -> None:
    """It has a gradient, is of zero gradient, is refused with a reason, or is defined by operators that are known."""
    schema = _newest()[name]
    defined = not schema.domain and (schema.has_function or schema.has_context_dependent_function)
    assert defined or any(name in table for table in (VJPS, ACTIVATIONS, ZERO_GRADIENT, REFUSED))


def test_an_operator_that_nobody_knows_is_noticed(monkeypatch) -> None:
    monkeypatch.delitem(VJPS, "Conv")
    with pytest.raises(AssertionError):
        test_every_operator_of_floats_is_known("Conv")


def test_no_operator_stands_in_two_families() -> None:
    assert sum(map(len, FAMILIES.values())) == len(VJPS)


def test_rows() -> None:
    rows = {(row["family"], row["operator"]): row for row in operator_table()}
    conv = rows["linear", "Conv"]
    assert conv["differentiated"] == ["X", "W", "B"]
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


@pytest.mark.parametrize("page", readme_table.TABLES)
def test_pages_are_current(page: str) -> None:
    text = (readme_table.ROOT / page).read_text(encoding="utf-8")
    assert text == readme_table.current(page, text), "python tools/readme_table.py"


def test_a_stale_table_is_noticed_and_rewritten(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(readme_table, "PAGES", tmp_path)
    for page, held in readme_table.TABLES.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        tables = "\n".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->" for name in held)
        (tmp_path / page).write_text(f"before\n{tables}\nafter\n")
    readme = tmp_path / "README.md"
    assert readme_table.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert readme_table.main([]) == 0
    assert readme_table.main(["--check"]) == 0
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")
    assert "MaxPool" in readme.read_text()
    assert "| ONNX Runtime |" in readme.read_text()
    assert "| MaxPool | pooling | 7-22 | X | |" in (tmp_path / "docs/operators.md").read_text()
    assert "old\n" not in readme.read_text()


def test_a_readme_without_markers_is_refused(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "README.md").write_text("nothing")
    monkeypatch.setattr(readme_table, "PAGES", tmp_path)
    assert readme_table.main([]) == 1
    assert "operators:begin" in capsys.readouterr().err
