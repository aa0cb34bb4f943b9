"""What `tools/bench.json` says of the profiles, and the benchmark's networks are what their names promise."""

from __future__ import annotations

import json

import bench_table
import pytest

ROWS = json.loads(bench_table.RESULTS.read_text(encoding="utf-8"))


@pytest.mark.parametrize("row", [row for row in ROWS if "cosine_of_profiles" in row], ids=lambda row: row["network"])
def test_the_profiles_agreed_when_it_was_measured(row) -> None:
    assert row["cosine_of_profiles"] >= 0.999999


@pytest.mark.parametrize(
    ("name", "millions"), [("resnet50", 25.6), ("mobilenet_v2", 3.5), ("densenet121", 8.0), ("squeezenet", 1.2)]
)
def test_parameters(name: str, millions: float) -> None:
    pytest.importorskip("torch", reason="the networks are written in it")
    from benchmark.networks import build

    count = sum(weight.numel() for weight in build(name).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.06)
