"""Write to the storage in a background thread, with retries.

A save stages its files on this machine's disk within seconds; hashing, copying and publishing
them may take minutes, and a store may be unreachable for a while.
"""

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from .errors import RunError
from .secrets import redact

PAUSES = (1.0, 2.0, 4.0, 8.0)
_CLOSE_SECONDS = 60.0


class Uploader:
    """Runs uploads in a thread, at most one at a time.

    At the end of its context it waits for the running upload, which is then not retried.

    Args:
        pauses: seconds before each retry of an upload that raised an OSError; default `PAUSES`.
    """

    def __init__(self, pauses: Sequence[float] | None = None) -> None:
        self._pauses = PAUSES if pauses is None else pauses
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None
        self.error: str | None = None
        """The error of the last upload after all its retries; None if it succeeded."""
        self.waited_seconds = 0.0
        """Total time for which the training waited for uploads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)

    @property
    def is_idle(self) -> bool:
        """True if no upload is running."""
        return self._thread is None or not self._thread.is_alive()

    def start(self, work: Callable[[], None], clean_up: Callable[[], None] = lambda: None) -> None:
        """Run the work in the thread, after the running upload.

        Args:
            work: can be repeated after a part of it is done.
            clean_up: called after the last attempt has failed.
        """
        self.wait()
        self.error = None
        self._thread = threading.Thread(
            target=self._run, args=(work, clean_up), name="finray-upload", daemon=True
        )
        self._thread.start()

    def do(self, work: Callable[[], None], place: object) -> None:
        """Run the work in the thread and wait for it.

        Raises:
            RunError: the storage failed; `place` names it.
        """
        self.start(work)
        self.wait()
        if self.error is not None:
            raise RunError(
                f"cannot write into {place}: {self.error}; make room there, or check the network "
                "and the rights, and run the same command"
            )

    def wait(self) -> None:
        """Wait for the running upload. Raises its exception, except an OSError."""
        if self._thread is not None:
            started = time.monotonic()
            self._thread.join()
            self.waited_seconds += time.monotonic() - started
        if self._fault is not None:
            raise self._fault

    def _run(self, work: Callable[[], None], clean_up: Callable[[], None]) -> None:
        try:
            self.error = self._attempt(work)
            if self.error is not None:
                clean_up()
        except Exception as error:  # noqa: BLE001 - `wait` raises it in the training's thread
            self._fault = error

    def _attempt(self, work: Callable[[], None]) -> str | None:
        """Run the work, with retries after an OSError; returns the last error, or None."""
        for pause in (*self._pauses, None):
            try:
                work()
                return None
            except OSError as error:
                message = redact(str(error) or type(error).__name__)
            if pause is None or self._closing.wait(pause):
                break
        return message
