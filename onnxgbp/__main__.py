"""`python -m onnxgbp` is the command `onnxgbp`."""

from onnxgbp.cli import main

main()
