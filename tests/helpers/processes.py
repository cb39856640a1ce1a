"""A few processes in one gloo group, which run functions together and give back what each returned.

They start once and then take one function after the other, since a start costs seconds. If a
function hangs or kills a process, they are stopped, and the next call starts new ones.
"""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

GROUP_TIMEOUT = timedelta(seconds=20)  # a collective that not all processes reach
CALL_TIMEOUT = 90  # seconds


class Failed(Exception):
    """What a process raised, as text."""


class Processes:
    """`count` processes; processes(function, *args) is [function(*args) on each of them]."""

    def __init__(self, count):
        self.count = count
        self.connections = []

    def __call__(self, function, *args):
        """A `Failed` stands where a process raised."""
        if not self.connections:
            self._start()
        for connection in self.connections:
            connection.send((function, args))
        results = []
        for connection in self.connections:
            if not connection.poll(CALL_TIMEOUT):
                self.stop()
                raise AssertionError(f"{function.__name__} hangs, after {results}")
            try:
                results.append(connection.recv())
            except EOFError:
                self.stop()
                raise AssertionError(f"{function.__name__} ended a process") from None
        failed = [isinstance(result, Failed) for result in results]
        if any(failed) and not all(failed):
            self.stop()  # the others may wait in the middle of a collective
        return results

    def _start(self):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        self.workers = []
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            worker = context.Process(
                target=_serve, args=(rank, self.count, port, theirs), daemon=True
            )
            worker.start()
            theirs.close()
            self.connections.append(ours)
            self.workers.append(worker)

    def stop(self):
        for worker in self.workers if self.connections else ():
            worker.kill()
            worker.join()
        self.connections = []


def _serve(rank, count, port, connection):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    dist.init_process_group("gloo", rank=rank, world_size=count, timeout=GROUP_TIMEOUT)
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # torch's, of a model whose last operation gives a view, as an adapter's does
                warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
                result = function(*args)
        except Exception as error:
            lines = traceback.format_exc().splitlines()[-6:]
            result = Failed(f"{type(error).__name__}: {error}", "\n".join(lines))
        connection.send(result)
