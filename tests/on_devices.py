"""Scripts under several CPU devices, with which JAX has to be started: processes of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from paths import ROOT


def run(count: int, *scripts: str, arguments: tuple[Path, ...] = (), flags: str = "") -> str:
    """The last line that the scripts, one after the other in one process, print.

    `flags` are more of XLA's.
    """
    ran = subprocess.run(
        [sys.executable, "-c", "".join(map(textwrap.dedent, scripts)), *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={count} {flags}",
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",  # much is compiled and little run
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip().splitlines()[-1]
