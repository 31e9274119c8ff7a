"""Other people's implementations of the same loss, one file each.

To add one, write an `Implementation` and name it among the losses of its framework
(benchmarks/jax_losses.py, benchmarks/torch_losses.py) and in the rows of benchmarks/table.py.
A peer that is not installed is skipped, with the import error as the reason.
"""
