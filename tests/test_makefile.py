"""The two commands start on any machine: the search for a Python, the lock, the CI script."""

import os
import pathlib
import re
import shutil
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from paths import ROOT

LOCK = [
    Requirement(line)
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if line and not line.startswith("#")
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


class Machine:
    """A PATH and a home with only the Pythons that a test puts there."""

    def __init__(self, folder: pathlib.Path):
        self.bin = folder / "bin"
        self.home = folder / "home"
        self.bin.mkdir()
        for tool in ("ls", "sort"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))

    def pyenv(self, version: str, works: bool = True) -> pathlib.Path:
        return self._put(self.home / ".pyenv" / "versions" / version / "bin" / "python", works)

    def python(self, name: str, works: bool = True) -> pathlib.Path:
        """Puts a Python on the PATH that starts, or one that fails as a pyenv shim does."""
        return self._put(self.bin / name, works)

    def _put(self, path: pathlib.Path, works: bool) -> pathlib.Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\nexit {0 if works else 127}\n")
        path.chmod(0o755)
        return path

    def find(self) -> subprocess.CompletedProcess[str]:
        make = str(shutil.which("make"))
        environment = {"PATH": str(self.bin), "HOME": str(self.home)}
        return subprocess.run(
            [make, "--no-print-directory", "-C", str(ROOT), "python"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def found(self) -> pathlib.Path:
        result = self.find()
        assert result.returncode == 0, result.stderr
        return pathlib.Path(result.stdout.strip())


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> Machine:
    return Machine(tmp_path)


def test_the_newest_python_on_the_path_is_taken(machine: Machine):
    machine.python("python3.12")
    machine.python("python3")
    newest = machine.python("python3.14")
    assert machine.found() == newest


def test_a_shim_that_fails_is_passed_over(machine: Machine):
    machine.python("python3.14", works=False)
    machine.python("python3.13", works=False)
    works = machine.python("python3.12")
    assert machine.found() == works


def test_pyenv_s_newest_that_works_is_next(machine: Machine):
    machine.python("python3.13", works=False)
    machine.python("python3")
    machine.pyenv("3.13.1", works=False)
    machine.pyenv("3.12.9")
    machine.pyenv("3.11.7")
    newest = machine.pyenv("3.12.10")
    assert machine.found() == newest


def test_python3_is_the_last_resort(machine: Machine):
    machine.pyenv("3.11.7")
    last = machine.python("python3")
    assert machine.found() == last


def test_without_a_python_one_line_says_what_is_missing(machine: Machine):
    machine.python("python3", works=False)  # as one that is too old
    result = machine.find()
    assert result.returncode != 0
    assert not result.stdout
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert "needs Python 3.12 or newer" in line


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_lock_pins_everything_that_is_asked_for():
    pins = {canonical(pin.name): pin for pin in LOCK}
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["train"] + extras["plot"] + extras["dev"]
    for requirement in map(Requirement, wanted):
        (version,) = [s.version for s in pins[canonical(requirement.name)].specifier]
        assert requirement.specifier.contains(version), requirement


def test_every_line_of_the_lock_is_a_pin_and_jax_is_the_one_we_promise():
    for pin in LOCK:
        assert [specifier.operator for specifier in pin.specifier] == ["=="], pin
        assert pin.url is None
    assert {str(pin) for pin in LOCK} >= {"jax==0.11.2", "jaxlib==0.11.2"}


def test_the_library_alone_needs_little():
    names = {Requirement(dependency).name for dependency in PROJECT["dependencies"]}
    assert names == {"jax", "jaxtyping", "numpy"}


def test_the_ci_script_is_sound_bash():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "make test" in script.read_text()
