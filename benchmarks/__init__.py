"""Time, memory and accuracy of the loss, beside its peers, on whatever device is there.

Each file here is a command, `python -m benchmarks.NAME`: `loss` measures implementations on one
case, `table` every installed peer on the same inputs, from which the README's table is taken,
`everywhere` default settings at every case, and `train_step` whole steps of the trainer; `tune`
looks for the kernels' tiles, `filter_error` works out what a gradient filter does, and `extract`
makes activations of a real model. (`flags` are theirs.) All need a checkout and the `train` extra.

What they are made of lies in the folders, each of which needs only those before it: `inputs`,
`implementations`, `measure`, `frameworks`, `steps`. What was measured is in `results`, what was
learnt in NOTES.md and `notes`.
"""
