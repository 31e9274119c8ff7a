"""What is set before a command imports anything that takes time."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib

import pytest
from paths import ROOT

from train import start

PROGRAM = """
import gc, sys
from train import start
start.begin("me")
assert "jax" not in sys.modules
assert gc.isenabled() and gc.get_threshold()[0] >= 100_000
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((3, 3))).block_until_ready()
print(jax.config.jax_compilation_cache_dir)
"""


@pytest.mark.parametrize("given", ["nothing", "JAX's own", "off", "no folder"])
def test_programs_are_kept_in_the_user_s_cache_unless_told_otherwise(given, tmp_path):
    (tmp_path / "file").touch()
    environment = {
        name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name
    }
    environment |= {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    environment |= {
        "nothing": {},
        "JAX's own": {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")},
        "off": {"JAX_COMPILATION_CACHE_DIR": ""},
        "no folder": {"XDG_CACHE_HOME": str(tmp_path / "file")},
    }[given]
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    kept = {"nothing": tmp_path / "lsce" / "programs", "JAX's own": tmp_path / "own"}.get(given)
    assert process.stderr == ""
    assert process.stdout.strip() == {"off": "", "no folder": "None"}.get(given, str(kept))
    assert {path.name for path in tmp_path.iterdir()} == {
        "file", *([kept.relative_to(tmp_path).parts[0]] if kept else [])
    }  # fmt: skip
    if kept:
        assert list(kept.glob("jit_*"))


@pytest.mark.slow
def test_a_program_that_a_kill_left_half_written_is_compiled_and_kept_again(tmp_path):
    environment = {
        name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name
    }
    environment |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}

    def kept(tear: bool) -> dict[str, int]:
        """The sizes of the programs after one more process."""
        for program in (tmp_path / "lsce" / "programs").glob("jit_*") if tear else ():
            os.truncate(program, program.stat().st_size // 2)
        command = [sys.executable, "-W", "error", "-c", PROGRAM]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        files = (tmp_path / "lsce" / "programs").glob("jit_*")
        return {file.name: file.stat().st_size for file in files}

    first = kept(tear=False)
    again = kept(tear=True)
    assert again.keys() == first.keys() != set()
    for name, size in first.items():
        assert again[name] > 0.9 * size  # which holds a time, too


def test_what_is_torn_is_removed_and_what_is_whole_stays(tmp_path):
    whole = zlib.compress(bytes(1000))
    for name, content in (("whole", whole), ("torn", whole[:-1]), ("empty", b"")):
        (tmp_path / f"jit_{name}-cache").write_bytes(content)
        start.remove_torn(tmp_path)
        assert [path.name for path in tmp_path.glob("jit_*")] == ["jit_whole-cache"]


SILENCED = """
import sys
from train import start

def main():
    print("x" * 10**6)
    return 0

def stop():
    print("x")
    raise SystemExit(0)

sys.exit(start.run({"main": main, "stop": stop}[sys.argv[1]]))
"""


@pytest.mark.parametrize(
    "command", [["-c", SILENCED, "main"], ["-c", SILENCED, "stop"], ["-m", "train", "--help"]]
)
def test_a_reader_that_goes_away_ends_a_command_without_a_word(command):
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert said == b""
    assert process.returncode == start.NOBODY_READS == 141
