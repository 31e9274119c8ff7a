"""The trainer: supervised fine-tuning on the fused loss. Start it with `python -m train`."""
