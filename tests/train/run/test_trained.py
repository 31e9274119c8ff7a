"""What patterns freeze, and that a run's folder keeps them."""

from __future__ import annotations

import dataclasses

import pytest

from train.config import TrainConfig
from train.models.config import PRESETS
from train.run import folder
from train.run.trained import frozen

NANO = PRESETS["nano"]
ATTENTION = {f"blocks.attention.{name}.kernel" for name in ("query", "key", "value", "out")}
BLOCK_NORMS = {"blocks.attention_norm.scale", "blocks.mlp_norm.scale"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["embedding"], {"embedding.embedding"}),
        (["blocks.attention"], ATTENTION),
        (["blocks.*.[uo]*.kernel"], {"blocks.attention.out.kernel", "blocks.mlp.up.kernel"}),
        (["norm", "blocks.*_norm"], {"norm.scale", *BLOCK_NORMS}),
        ([], set()),
    ],
)
def test_a_pattern_is_of_a_name_or_of_its_first_parts(patterns, expected):
    assert set(frozen(NANO, patterns)) == expected


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["embedding", "block"], "--freeze block matches no weight of this model: it has "),
        (["untied_head"], "it has .*blocks.mlp.up.kernel.*embedding.embedding"),
        (["*"], r"--freeze \* leaves nothing to train"),
    ],
)
def test_what_freezes_nothing_or_everything_is_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        frozen(NANO, patterns)
    untied = dataclasses.replace(NANO, tied_head=False)
    assert frozen(untied, ["untied_head"]) == ("untied_head",)


def test_a_run_goes_on_with_what_it_froze_and_with_nothing_else(tmp_path):
    config = TrainConfig.of(out=tmp_path / "run", freeze=("embedding", "norm"))
    folder.claim(config)
    again = config.replace(resume=True)
    assert folder.find(again) == tmp_path / "run"
    with pytest.raises(ValueError, match=r"--freeze was \('embedding', 'norm'\) and is \(\)"):
        folder.find(again.replace(freeze=()))
