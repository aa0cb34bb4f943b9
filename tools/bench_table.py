"""The README's table of speed, from `tools/bench.json`; `readme_table.py` puts it there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "bench.json"

HEAD = """\
| network, batch | forward, ms | guided, ms | x forward | gradient, x forward | memory, x forward | Captum | torch | \
ORT training | onnx-ad | OpenVINO |
|---|---|---|---|---|---|---|---|---|---|---|"""
LEGEND = """\
Times of others are multiples of ours: Captum's guided backpropagation, in its faster layout, of our guided; the
gradients of torch's autograd, of onnxruntime-training and of onnx-ad, these two from the same `.onnx` file, of our
gradient. OpenVINO runs our file of the `portable` profile, guided: the multiple is of its own forward pass."""


def bench_markdown() -> str:
    """The table of the rows that compare with peers, why some have none, and a line on where it was measured."""
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [row for row in rows if not row.get("growth") and not row.get("targets") and row["case"] != "convert"]
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "error" not in row:
            cases.setdefault((row["network"], row["batch"]), {})[row["case"]] = row
    lines = [HEAD]
    for (network, batch), found in cases.items():
        forward, guided, gradient = (found[case] for case in ("forward", "guided", "gradient"))
        cells = [
            *(f"{network}, {batch}", f"{_time(forward)[0]:.1f}", f"{_time(guided)[0]:.1f}"),
            *(f"{_time(guided)[1]:.2f}", f"{_time(gradient)[1]:.2f}", f"{guided['rss_ratio']:.1f}"),
            _against(found, guided, "captum guided", "captum guided channels_last"),
            *(_against(found, gradient, f"{peer} gradient") for peer in ("torch", "onnxruntime-training", "onnx-ad")),
            _against(found, found.get("openvino forward"), "openvino guided", digits=2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", LEGEND]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "error" in row:
            reasons.setdefault((row["case"], row["error"]), []).append(f"{row['network']}, {row['batch']}")
    lines += ["", *(f"- {case}: {reason} ({'; '.join(where)})" for (case, reason), where in reasons.items())]
    for machine in _machines(rows):
        lines += ["", machine]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _against(found: dict[str, dict[str, Any]], ours: dict[str, Any] | None, *cases: str, digits: int = 1) -> str:
    """The least time of these cases as a multiple of ours; nothing where none was measured."""
    times = [_time(found[case])[0] for case in cases if case in found]
    return f"{min(times) / _time(ours)[0]:.{digits}f}" if times and ours else ""


def _time(row: dict[str, Any]) -> tuple[float, float]:
    """Milliseconds, and how often the forward pass: of one thread the CPU time, which no other load changes."""
    if row["threads"] == 1:
        return row["least_cpu_ms"], row["cpu_ratio"]
    return row["median_ms"], row["ratio"]


def _machines(rows: list[dict[str, Any]]) -> list[str]:
    """Where it was measured, and with which versions: each peer has an environment of its own."""
    versions: dict[str, dict[str, None]] = {}
    for row in rows:
        threads = "CPU time of 1 thread" if row["threads"] == 1 else f"{row['threads']} threads"
        known = versions.setdefault(f"{row['cpu']}, {threads}, provider {row['provider']}", {})
        known |= {f"{name} {version}": None for name, version in row["versions"].items() if name != "onnxgbp"}
    return [f"{machine}; {', '.join(known)}." for machine, known in sorted(versions.items())]
