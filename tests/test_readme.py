"""What the README shows runs, and says the truth."""

import inspect
import pathlib
import re
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from paths import ROOT

import lsce
from benchmarks.inputs import cases
from lsce import backends, calibration
from train.config import TrainConfig
from train.run.options import DEFAULT_STEPS

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def migration(word: str) -> str:
    (block,) = [block for block in BLOCKS if block.startswith(f"# {word}\n")]
    return block


def as_function(source: str) -> Callable[..., jax.Array]:
    """The README's lines as a function of what they use."""
    namespace = {"jax": jax, "lsce": lsce, "optax": optax}
    body = textwrap.indent(source, "    ")
    exec(f"def f(hidden, head, labels):\n{body}\n    return loss", namespace)
    return namespace["f"]


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All other blocks, run one after the other as a reader would."""
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("readme"))
        for block in BLOCKS:
            if not block.startswith(("# before", "# after")):
                exec(block, names)
        names["picture"] = pathlib.Path("reliability.png").stat().st_size
    return names


def test_the_example_trains(namespace: dict[str, Any]):
    arguments = [namespace[name] for name in ("model", "optimizer", "tokens", "labels")]
    first = float(namespace["loss"])
    for _ in range(5):
        last = float(namespace["train_step"](*arguments))
    assert np.isfinite(last)
    assert last < first


def test_the_calibration_example_counts_every_token_with_a_label(namespace: dict[str, Any]):
    assert int(namespace["result"].count) == 4 * 31
    assert 0 <= float(namespace["result"].ece) <= 1
    assert namespace["picture"] > 1000


def test_the_migration_keeps_loss_and_gradients():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (33, 24))
    head = jax.random.normal(keys[1], (201, 24)) / 3
    labels = jax.random.randint(keys[2], (33,), 0, 201)
    before, after = (
        jax.value_and_grad(as_function(migration(word)), argnums=(0, 1))(hidden, head, labels)
        for word in ("before", "after")
    )
    np.testing.assert_allclose(after[0], before[0], rtol=1e-6)
    for ours, theirs in zip(after[1], before[1], strict=True):
        np.testing.assert_allclose(
            ours, theirs, rtol=1e-4, atol=1e-6 * float(jnp.abs(theirs).max())
        )
        assert float(jnp.abs(theirs).max()) > 1e-3


def test_the_table_of_options_is_the_signature():
    parameters = inspect.signature(lsce.linear_cross_entropy).parameters
    options = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    section = README.split("## Options")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", section, re.MULTILINE)
    assert [name for name, _ in rows] == [option.name for option in options]
    for (name, shown), option in zip(rows, options, strict=True):
        assert shown.replace("−", "-").strip('"') == str(option.default), name


def test_the_table_of_backends_is_the_registry():
    section = README.split("## Devices")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(backends.MODULES)


def test_every_flag_exists_with_its_default():
    fields = TrainConfig().flags()
    section = README.split("## Training")[1].split("\n## ")[0]
    flags = {flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]+)", section)}
    assert flags - {"help"} <= fields.keys()
    shown = {
        "label_smoothing": 0.1, "learning_rate": 3e-3, "schedule": "cosine", "batch_size": 4,
        "accumulate": 1, "model": "tiny", "dtype": "auto", "remat": "none", "softcap": None,
        "temperature": 1, "z_loss": 0, "dropout": 0.1,
    }  # fmt: skip
    assert {name: fields[name] for name in shown} == shown
    assert DEFAULT_STEPS == 250


def test_every_name_exists():
    for name in re.findall(r"`lsce\.(\w+)", README):
        assert hasattr(lsce, name), name
    section = README.split("## Calibration")[1].split("\n## ")[0]
    for name in re.findall(r"`([a-z]+_[a-z_]+)`", section):
        assert hasattr(calibration, name), name


def test_every_command_parses():
    from benchmarks import everywhere, loss, table

    (commands,) = re.findall(r"```sh\n(python -m benchmarks.*?)```", README, re.DOTALL)
    parsers = {
        "benchmarks.loss": loss.parse,
        "benchmarks.table": table.parse,
        "benchmarks.everywhere": everywhere.parse,
    }
    for line in commands.splitlines():
        module, *flags = line.partition("#")[0].split()[2:]
        options = parsers[module](flags)
        named = [options.case] if isinstance(options.case, str) else options.case
        assert set(named) <= cases.CASES.keys()


def test_no_cell_of_a_table_is_longer_than_a_line():
    cells = [cell for line in README.splitlines() if line[:1] == "|" for cell in line.split("|")]
    assert len(cells) > 100
    assert max(map(len, cells)) <= 100


def test_every_linked_file_exists():
    root = ROOT
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", README)
    assert links
    for link in links:
        assert (root / link).exists(), link
