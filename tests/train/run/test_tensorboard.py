"""Scalars for TensorBoard: what they cost at the start. What they say, the metrics' tests ask."""

from __future__ import annotations

import subprocess
import sys

from paths import ROOT

PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:]
import train.run.loop
assert "tensorboardX" in sys.modules
assert "torch" not in sys.modules
import torch  # is there for whoever asks
print(torch.HERE)
"""


def test_torch_is_not_imported_where_it_is_installed(tmp_path):
    (tmp_path / "torch.py").write_text("HERE, Tensor = True, object\n")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(ROOT)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "True\n"
