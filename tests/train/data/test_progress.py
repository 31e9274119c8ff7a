import io
import logging
import re
import sys
import threading

import pytest

from train.data import progress
from train.data.progress import progress as show


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_file_what_takes_long_says_so_by_itself(monkeypatch, caplog):
    monkeypatch.setattr(progress, "SECONDS", 0.001)
    said = threading.Event()
    caplog.handler.addFilter(lambda _: said.set() or True)
    with caplog.at_level(logging.INFO, progress.__name__), show("packing", 2000) as advance:
        assert said.wait(30)  # though nothing advances
        advance(500)
        advance(700)
        said.clear()
        assert said.wait(30)
        said.clear()
        assert said.wait(30)
    lines = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"packing: \d+ s", lines[0])
    assert re.fullmatch(r"packing: 1,200 of 2,000, \d+ s", lines[-1])


def test_in_a_terminal_there_is_a_bar_and_then_nothing(monkeypatch, caplog):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with show("packing", 2000) as advance:
        advance(1200)
    written = sys.stderr.getvalue()
    assert "packing" in written
    assert "1200/2000" in written
    assert written.endswith("\x1b[2K")  # the line is cleared
    assert not caplog.records


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_goes_through(monkeypatch, terminal):
    if terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyError), show("packing"):
        raise KeyError
