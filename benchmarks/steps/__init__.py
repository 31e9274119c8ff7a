"""Whole training steps to measure: ours, as the trainer takes them, and a peer's in PyTorch."""
