"""Time and memory of the loss, beside its peers, on whatever device is there.

`python -m benchmarks.loss` measures implementations on one case, `python -m benchmarks.table` every
installed peer on the same inputs, from which the README's table is taken, and `python -m
benchmarks.everywhere` default settings at every case; `tune`, `filter_error` and `extract` say
themselves what they are for. All need a checkout and the `train` extra (for optax and rich).
"""
