"""Several processes that train one model together, as a rule one on each machine.

All run the same program with the same flags on the same data, and so decide the same. What they
send one another is what XLA sends, and what `agree` on signals and `check_same` take. The first
alone writes to the run's folder, which all see; of a checkpoint each writes its own devices' share.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.run.options import HostOptions

SECONDS_TO_MEET = 300
"""In which all processes must have started."""


def join(options: HostOptions) -> None:
    """Makes this process one of those that train together, if it is to be. Before JAX's first use.

    From then on all but the first say only what goes wrong.

    Raises:
      ValueError: where `auto` finds nothing, or the processes do not meet.
    """
    if options.coordinator is None:
        return
    # Signals are ours (`train.run.signals`): a handler of its own would take SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    told = {}
    if options.coordinator != "auto":
        told = {
            "coordinator_address": options.coordinator,
            "num_processes": options.processes,
            "process_id": options.process,
        }
    try:
        jax.distributed.initialize(**told, initialization_timeout=SECONDS_TO_MEET)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0][:200]
        raise ValueError(f"--coordinator {options.coordinator}: {reason}") from None
    if not first():
        logging.getLogger("train").setLevel(logging.ERROR)


def count() -> int:
    """The processes that train together."""
    return jax.process_count()


def first() -> bool:
    """Whether this process is the one that writes the run's files and says how it goes."""
    return jax.process_index() == 0


def wait(what: str) -> None:
    """Until all processes are here."""
    if count() > 1:
        multihost_utils.sync_global_devices(what)


def check_same(what: str) -> None:
    """Raises ValueError, in every process, unless all have the same text. Waits for all."""
    if count() == 1:
        return
    digest = np.frombuffer(hashlib.blake2b(what.encode(), digest_size=16).digest(), np.int32)
    digests = multihost_utils.process_allgather(digest)
    if others := [i for i, other in enumerate(digests) if (other != digests[0]).any()]:
        named = ", ".join(map(str, others))
        raise ValueError(
            f"process {named} has other flags, data or checkpoints than process 0: start all with"
            " the same flags but for --process, on the same files, with an --out that all see"
        )


def agree(own: Callable[[], int]) -> Callable[[], int]:
    """The largest of what `own` gives in all processes, when asked for.

    It is on its way while the devices compute what was given them before, so that who asks after
    that does not wait. Each process must agree equally often.
    """
    if count() == 1:
        return own
    mine = np.full(jax.local_device_count(), own(), np.int32)
    sharding = NamedSharding(_every_device(), PartitionSpec("device"))
    most = _most()(jax.make_array_from_process_local_data(sharding, mine))
    return lambda: int(most)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Inside, what XLA says where another process has gone becomes a ConnectionError.

    XLA has one error for that and for all else, as a lack of memory, which is said with it.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if count() == 1:
            raise
        raise ConnectionError(
            f"process {jax.process_index()} cannot go on with the others"
            f" ({str(error).splitlines()[0][:200]}): see what they say, and start all again with"
            " --resume"
        ) from error


def leave(status: int) -> int:
    """The exit status of a process that failed where others may not have. Of several it ends here:
    at its usual end it would wait for the others, which wait for it until they hear that it has
    gone."""
    if count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


@functools.cache
def _every_device() -> Mesh:
    return Mesh(np.array(jax.devices()), ("device",))


@functools.cache
def _most() -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jax.numpy.max, out_shardings=NamedSharding(_every_device(), PartitionSpec()))
