"""How well each token of held-out responses is predicted, and how calibrated that is."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from lsce import calibration
from train.data import files
from train.data.encode import encode_records
from train.data.packing import IGNORE, pack
from train.evaluation.measures import BINS, NAMES, bins, curve, within
from train.evaluation.results import Measure, Scored
from train.evaluation.scoring import ScoringOptions, TokenScores, owners, score_rows
from train.flags import require
from train.models import families
from train.run.model import Loaded

ROW = 512
"""Tokens of a row, unless the caller says."""


def score(
    loaded: Loaded,
    paths: Sequence[Path],
    *,
    max_length: int | None,
    batch_tokens: int,
    resamples: int,
    seed: int,
) -> Scored:
    """Every measure of the response tokens in files of records.

    Tokens of one response depend on each other, so intervals come from resampling records; measures
    whose bins or order all tokens decide together have none.

    Raises:
      ValueError: for files without a response, and what reading them raises.
    """
    length = max_length or min(ROW, families.positions(loaded.config_json) or ROW)
    records = [record for path in paths for record in files.read(path)]
    fitting = itertools.chain.from_iterable(encode_records(loaded.tokenizer, records, length))
    examples = [example for example in fitting if example.loss_mask.any()]
    rows = pack(examples, length)
    counted = rows.labels != IGNORE
    require(bool(counted.any()), f"{' '.join(map(str, paths))}: no response to predict")
    how = ScoringOptions(
        batch_size=max(1, batch_tokens // length),
        max_length=length,
        softcap=loaded.shape.final_softcap,
    )
    scores = TokenScores(*(field[counted] for field in score_rows(loaded.model, rows, how)))
    return measured(scores, owners(examples, length)[counted], resamples=resamples, seed=seed)


def measured(
    scores: TokenScores, record: Int[np.ndarray, " N"], *, resamples: int, seed: int
) -> Scored:
    """The measures of N tokens, `record` saying which record each is of."""
    confidence = np.minimum(np.asarray(scores.confidence, np.float32), 1)
    correct = np.asarray(scores.correct)
    pair = confidence, correct
    values = {
        "ece_equal_mass": calibration.expected_calibration_error(*pair, equal_mass=True),
        "rms": calibration.rms_calibration_error(*pair),
        "hendrycks_rms": calibration.hendrycks_rms(*pair),
        "smooth_ece": calibration.smooth_calibration_error(*pair),
        "auroc": calibration.auroc(*pair),
        "aurc": calibration.aurc(*pair),
    }
    found = {name: Measure(float(value)) for name, value in jax.device_get(values).items()}
    found |= _by_record(scores, record, resamples, seed)
    return Scored(
        n=len(record),
        measures={name: found[name] for name in NAMES if name in found},
        bins=bins(*pair),
        risk_coverage=curve(*pair),
    )


def _by_record(
    scores: TokenScores, record: Int[np.ndarray, " N"], resamples: int, seed: int
) -> dict[str, Measure]:
    """What sums over tokens give, with 95 % intervals from resampling the records."""
    confidence, correct = (np.asarray(x, np.float64) for x in (scores.confidence, scores.correct))
    columns = [np.ones_like(correct), correct, confidence, scores.brier, -scores.log_prob]
    inside = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [np.where(inside == b, confidence - correct, 0) for b in range(BINS)]
    counts = [inside == b for b in range(BINS)]
    of_record = np.unique(record, return_inverse=True)[1]
    sums = np.stack([np.bincount(of_record, column) for column in (*columns, *gaps, *counts)], 1)
    number = len(sums)
    random = np.random.default_rng(seed)
    even = np.full(number, 1 / number)
    drawn = np.array([random.multinomial(number, even) @ sums for _ in range(resamples)])
    values = _of_sums(sums.sum(0)[None])
    resampled = _of_sums(drawn) if resamples else {}
    found = {}
    for name, (value,) in values.items():
        if not resamples:
            found[name] = Measure(float(value))
            continue
        low, high = np.quantile(resampled[name], (0.025, 0.975))
        if name in ("ece", "mce"):  # see `measures.errors`
            low, high = 2 * value - high, 2 * value - low
        found[name] = within(name, Measure(float(value), float(low), float(high)))
    return found


def _of_sums(sums: Float[np.ndarray, "S C"]) -> dict[str, Float[np.ndarray, " S"]]:
    n, correct, confidence, brier, nll = sums[:, :5].T
    gaps, counts = np.abs(sums[:, 5 : 5 + BINS]), sums[:, 5 + BINS :]
    return {
        "accuracy": correct / n,
        "confidence": confidence / n,
        "gap": (confidence - correct) / n,
        "ece": gaps.sum(1) / n,
        "mce": (gaps / np.maximum(counts, 1)).max(1),
        "brier": brier / n,
        "nll": nll / n,
    }
