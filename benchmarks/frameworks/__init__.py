"""JAX and PyTorch: how each holds inputs, compiles and calls, and the process it is measured in."""
