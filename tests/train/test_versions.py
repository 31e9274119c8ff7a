"""What a result says of the programs that made it."""

import subprocess
from importlib.metadata import PackageNotFoundError

import pytest
from paths import ROOT

from train import versions


def git(folder, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_what_is_not_installed_has_no_version(monkeypatch):
    """As lsce itself, where the trainer is run from a checkout."""

    def absent(name):
        if name == "lsce":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(versions, "version", absent)
    found = versions.versions()
    assert (found["lsce"], found["jax"]) == (None, "1.0")
    assert found["commit"] == versions.commit()


@pytest.fixture
def checkout(tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "a.py").write_text("")
    git(tmp_path, "add", "a.py")
    who = "-c", "user.name=a", "-c", "user.email=a@b"
    git(tmp_path, *who, "commit", "--quiet", "--message", "a")
    return tmp_path


def test_the_commit_of_a_checkout_says_whether_files_have_changed_since(checkout):
    of_head = git(checkout, "rev-parse", "--short", "HEAD")
    assert versions.commit(checkout) == of_head
    (checkout / "a.py").write_text("changed")
    assert versions.commit(checkout) == f"{of_head}-dirty"


def test_an_environment_in_somebodys_checkout_has_none(checkout):
    installed = checkout / "venv" / "site-packages"
    installed.mkdir(parents=True)
    assert versions.commit(installed) is None


def test_there_is_none_without_git(checkout, tmp_path_factory, monkeypatch):
    assert versions.commit(tmp_path_factory.mktemp("plain")) is None
    monkeypatch.setenv("PATH", "")
    assert versions.commit(checkout) is None


def test_this_one_has_a_commit():
    if not (ROOT / ".git").exists():
        pytest.skip("an archive of the files is no checkout, and has no commit")
    assert versions.commit() is not None
