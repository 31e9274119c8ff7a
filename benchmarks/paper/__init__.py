"""The experiments of "Calibrated Language Models and How to Find Them with Label Smoothing" (Huang,
Lu and Zeng, ICML 2025, https://arxiv.org/abs/2508.00264), at the scale that one GPU allows.

    python -m benchmarks.paper.table1     Table 1, Figures 1, 2, 8, 9: calibration before and after
    python -m benchmarks.paper.betas      Appendix B.4: β from 0 to 0.5
    python -m benchmarks.paper.sizes      Figures 3 and 7: hidden size
    python -m benchmarks.paper.softcap    Figure 5: with and without a softcap
    python -m benchmarks.paper.curves     Figures 6 and 10: our loss against a naive one
    python -m benchmarks.paper.everything  of a model all but sizes, what says most first
    python -m benchmarks.paper.gather     what they found, small enough to commit, and its pages

Each but the last is a list of commands of the trainer, worked off in one process, and goes on where
it was: what is done is not done again, what a signal or `--minutes` stops is saved, what failed is
listed. All write to one folder, `steps` says what and how little of it has to be kept. `--tiny`
shows the whole of it on a CPU, on a few made-up records.
"""
