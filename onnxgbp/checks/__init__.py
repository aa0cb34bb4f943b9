"""The checks of `verify`, by what they look at, each a function of one `Subject` that gives one row.

`row.py` what a row is; `record.py` the options that the file's metadata tells; `subject.py` the file, its source, the
inputs, the runs; then the checks: `file.py`, `attribution.py`, `deployment.py`.
"""
