"""Several processes that train one model together, as a rule one on each machine.

All run the same program with the same flags on the same data, and so decide the same. What they
send one another is what XLA sends, what `alike` compares and the signals that `agree` tells. The
first alone writes to the run's folder, which all see; of a checkpoint each writes its own devices'
share. Where the first dies JAX may end the others itself, with a trace.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its `client` has no public name; Orbax takes it from here too
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train import command_line
from train.run.options import HostOptions

SECONDS_TO_MEET = 300
"""In which all processes must have started."""
SECONDS_TO_FIND = 3600
"""In which all must have read the data and made themselves ready."""
SECONDS_TO_LEAVE = 5
"""In which others that fail, too, should do so."""


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
    told: dict[str, Any] = {}
    if options.coordinator != "auto":
        _look_for(options.coordinator, first=options.process == 0)
        told = {
            "coordinator_address": options.coordinator,
            "num_processes": options.processes,
            "process_id": options.process,
            "cluster_detection_method": "deactivate",  # it would leave each process one GPU
        }
    try:
        jax.distributed.initialize(**told, initialization_timeout=SECONDS_TO_MEET)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0][:200]
        if not told:
            reason = f"there is no Slurm or Open MPI that says it ({reason}): give HOST:PORT"
        raise ValueError(f"--coordinator {options.coordinator}: {reason}") from None
    if not first():
        logging.getLogger("train").setLevel(logging.ERROR)


def _look_for(coordinator: str, *, first: bool) -> None:
    """Raises ValueError where JAX would end the process: without process 0, or with two of it."""
    host, _, port = coordinator.rpartition(":")
    until = time.monotonic() + SECONDS_TO_MEET
    try:
        if first:
            socket.create_server(("", int(port))).close()
            return
        while True:
            try:
                return socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            except socket.gaierror:
                raise
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)
    except OSError as error:
        reason = error.strerror or "it does not answer"
        raise ValueError(
            f"--coordinator {coordinator}: process 0 cannot listen there ({reason}): does another"
            " program, or another process 0?"
            if first
            else f"--coordinator {coordinator}: process 0 cannot be reached there ({reason}): all"
            f" processes must start within {SECONDS_TO_MEET} s"
        ) from None


def count() -> int:
    """The processes that train together."""
    return jax.process_count()


def first() -> bool:
    """Whether this process is the one that writes the run's files and says how it goes."""
    return jax.process_index() == 0


def alike[T](name: str, find: Callable[[], tuple[str, T]]) -> T:
    """What `find` finds here, once it has ended in all processes, and with the same text.

    `name` is of this call alone.

    Raises:
      ValueError: in all processes, where `find` raised ValueError or OSError in one, and where the
        texts differ.
    """
    if count() == 1:
        return find()[1]
    failure: Exception | None = None
    try:
        text, found = find()
        said = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    except (ValueError, OSError) as error:
        failure, found = error, None
        said = f"!{command_line.said(error)}"
    client: Any = distributed.global_state.client
    client.key_value_set(f"lsce/{name}/{jax.process_index()}", said)
    wait = SECONDS_TO_FIND * 1000
    all_said = [client.blocking_key_value_get(f"lsce/{name}/{i}", wait) for i in range(count())]
    client.wait_at_barrier(f"lsce/{name}", wait)  # process 0 has what was said: it goes last
    if failure is not None:
        raise failure
    for i, other in enumerate(all_said):
        if other.startswith("!"):
            raise ValueError(f"process {i} cannot train: {other[1:]}")
    if others := [str(i) for i, other in enumerate(all_said) if other != all_said[0]]:
        raise ValueError(
            f"process {', '.join(others)} has other flags, data or checkpoints than process 0:"
            " start all with the same flags but for --process, on the same files, with an --out"
            " that all see"
        )
    return found  # pyright: ignore[reportReturnType]


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
    except Exception as error:
        if (cause := lost(error)) is None:
            raise
        raise ConnectionError(
            f"process {jax.process_index()} cannot go on with the others"
            f" ({str(cause).splitlines()[0][:200]}): see what they say, and start all again with"
            " --resume"
        ) from error


def lost(error: BaseException | None) -> BaseException | None:
    """What XLA said, of several processes, if an error came of that; else None."""
    while error is not None and count() > 1:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return error
        error = error.__cause__ or error.__context__
    return None


def leave(status: int) -> int:
    """The exit status of a process that failed where others may not have. Of several it ends here:
    at its usual end it would wait for the others, which wait for it until they hear that it has
    gone."""
    if count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        client: Any = distributed.global_state.client
        with contextlib.suppress(Exception):  # they may have gone, or know of nothing
            client.wait_at_barrier("lsce/leave", SECONDS_TO_LEAVE * 1000)
            if first():
                time.sleep(1)  # without process 0 JAX would end the others before they have
        os._exit(status)
    return status


@functools.cache
def _every_device() -> Mesh:
    return Mesh(np.array(jax.devices()), ("device",))


@functools.cache
def _most() -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jax.numpy.max, out_shardings=NamedSharding(_every_device(), PartitionSpec()))
