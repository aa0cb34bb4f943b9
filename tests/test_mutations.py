"""No model makes it crash: random edits of real models are converted, or refused in one line.

`MUTATIONS` in the environment sets the number of seeds; `tools/test` runs 200, a change of the loader deserves 1000.
`tools/test --fuzz-files` makes the same edits, led by the code that they reach.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import onnx
import pytest
from mutations import mutate

import onnxgbp

CORPUS = Path(__file__).parent / "data" / "corpus"
MODELS = sorted({row["onnx"] for row in json.loads((CORPUS / "manifest.json").read_text())})
SEEDS = int(os.environ.get("MUTATIONS", "200"))


@pytest.mark.parametrize("chunk", range(8))
def test_converted_or_refused(chunk: int) -> None:
    outcomes = {"converted": 0, "refused": 0}
    for seed in range(chunk, SEEDS, 8):
        dice = random.Random(seed)
        model = onnx.load(CORPUS / dice.choice(MODELS))
        for _ in range(dice.randrange(1, 4)):
            mutate(model, dice)
        try:
            onnxgbp.convert(model, method=dice.choice(["gradient", "guided"]), profile=dice.choice(["ort", "portable"]))
            outcomes["converted"] += 1
        except onnxgbp.OnnxgbpError as error:
            assert str(error).strip(), f"seed {seed}"
            assert str(error).isprintable(), f"seed {seed}"
            outcomes["refused"] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed} ends in {type(error).__name__}: {error}") from error
    assert min(outcomes.values()) > 0, outcomes  # the edits are neither harmless nor all fatal
