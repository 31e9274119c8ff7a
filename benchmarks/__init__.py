"""Time and memory of the loss, beside its peers, on whatever device is there.

`python -m benchmarks.loss` measures implementations on one case; `python -m benchmarks.table` runs
every installed peer on the same inputs and renders the tables of the README. Both need a checkout
and the `train` extra (for optax and rich).
"""
