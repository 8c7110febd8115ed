"""A process of its own for what may hang, crash or leave a device unusable."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_SPAWN = multiprocessing.get_context("spawn")  # a forked process can't use the GPU
_PATIENCE_S = 10  # not for ever: the driver may hold on to a process whose kernel hangs


class Worker:
    """Calls functions in another process, one at a time, and replaces it when it is lost.

    Args:
        timeout_s: Seconds that a call may take, the start of the process included.
    """

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self._child: tuple[BaseProcess, Connection] | None = None

    def failure(self, function: Callable[..., str | None], *args: Any) -> str | None:
        """What ``function(*args)`` says is wrong; None when nothing is.

        A function that raises, kills its process or does not return in time is a failure too, and
        the next call gets a new process.
        """
        if self._child is None or not self._child[0].is_alive():
            self.close()
            self._child = self._start()
        child, pipe = self._child
        try:
            pipe.send((function, args))
            if not pipe.poll(self.timeout_s):
                self.close()
                return f"not done after {self.timeout_s:g} s"
            lost, failure = pipe.recv()
        except (EOFError, OSError):
            child.join(_PATIENCE_S)
            lost, failure = True, f"its process died (exit code {child.exitcode})"
        if lost:
            self.close()
        return failure

    @staticmethod
    def _start() -> tuple[BaseProcess, Connection]:
        ours, theirs = _SPAWN.Pipe()
        child = _SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
        child.start()
        theirs.close()
        return child, ours

    def close(self) -> None:
        """End the process, if there is one."""
        if self._child is not None:
            child, pipe = self._child
            self._child = None
            pipe.close()
            child.kill()
            child.join(_PATIENCE_S)


def _serve(pipe: Connection) -> None:
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((False, function(*args)))
        except Exception as error:
            message = (str(error).strip() or "no message").splitlines()[0]
            pipe.send((True, f"{type(error).__name__}: {message}"[:200]))
            return
