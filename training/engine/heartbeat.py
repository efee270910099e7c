"""Signs of a worker's progress, which another process reads.

The thread that trains writes its phase and a count into a small file. It stops doing so when it
hangs, whatever the cause: a stopped process, a call that holds Python's lock, a collective that
waits for ever. Neither side compares clocks.
"""

import faulthandler
import os
import struct
import time
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGUSR2
from types import TracebackType
from typing import Literal, Self, cast

Timeout = float | Literal["auto"] | None
"""The setting scale.hang_timeout."""
Phase = Literal[
    "start", "rendezvous", "loading", "first step", "step", "rollout", "evaluation", "save"
]

STACKS_SIGNAL = SIGUSR2
"""Makes a worker write the stacks of its threads, also while a call holds Python's lock."""
ALLOWANCES: dict[Phase, float] = {
    "start": 8.0,
    "rendezvous": 6.0,
    "loading": 24.0,
    "first step": 6.0,
    "step": 1.0,
    "rollout": 6.0,
    "evaluation": 12.0,
    "save": 12.0,
}
"""How long a phase may last, as a multiple of what a step may."""
_AUTO_SECONDS = 300.0
_AUTO_FACTOR = 10.0
_REMEMBERED = 20
_RECORD = struct.Struct("<QdQ16s")
_LONGEST_TICK = 1.0


@dataclass(frozen=True)
class Beat:
    """The last sign of a worker."""

    count: int
    limit: float
    """Seconds until the next one is due; 0 for no limit."""
    step: int
    """The step that the phase belongs to, counted from 1."""
    phase: Phase

    def __str__(self) -> str:
        return {
            "start": "loading the libraries",
            "rendezvous": "meeting the other workers",
            "loading": "loading the model and the data",
            "first step": f"step {self.step}, the first of this attempt,",
            "step": f"step {self.step}",
            "rollout": f"sampling and scoring for step {self.step}",
            "evaluation": f"the evaluation after step {self.step}"
            if self.step
            else "the evaluation before the first step",
            "save": f"the save after step {self.step}",
        }[self.phase]


class Heartbeat:
    """The worker's side: the thread that trains reports its phases.

    As a context manager it makes the process write its stacks on `STACKS_SIGNAL`.

    Args:
        file: receives the beats; `expect_beats` has created it. None: nobody listens.
        timeout: the setting scale.hang_timeout.
    """

    def __init__(self, file: Path | None = None, timeout: Timeout = None) -> None:
        self._limits = _Limits(timeout)
        self._file = file
        self._stream = None if file is None else file.open("r+b", buffering=0)
        self._stacks = None if file is None else stacks_file(file).open("wb")
        self._beat = Beat(0, 0.0, 0, "start")
        self._since = time.monotonic()

    def __enter__(self) -> Self:
        if self._stacks is not None:
            faulthandler.register(STACKS_SIGNAL, self._stacks, all_threads=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stacks is not None:
            faulthandler.unregister(STACKS_SIGNAL)
            self._stacks.close()
        if self._stream is not None:
            self._stream.close()

    def enter(self, phase: Phase, step: int = 0) -> None:
        """Report that a phase begins, which ends the one before."""
        now = time.monotonic()
        self._limits.add(self._beat.phase, now - self._since)
        self._since = now
        self._beat = Beat(self._beat.count + 1, self._limits.of(phase), step, phase)
        self._write()

    def beat(self) -> None:
        """Report progress inside a phase; its allowance begins again."""
        self._beat = Beat(self._beat.count + 1, self._beat.limit, self._beat.step, self._beat.phase)
        self._write()

    def _write(self) -> None:
        if self._stream is not None:
            with suppress(OSError):  # a full disk: the training does not depend on it
                os.pwrite(self._stream.fileno(), _pack(self._beat), 0)


class Watch:
    """The reader's side; call `hung` several times a second.

    Args:
        file: a worker's file.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._last: bytes | None = None
        self._elapsed = 0.0
        self._ticked = time.monotonic()

    def hung(self, counts: bool = True) -> Beat | None:
        """The last beat, if the next one is overdue; else None.

        Args:
            counts: False if the time since the last call does not count.
        """
        now = time.monotonic()
        # The time for which this process itself was stopped does not count either.
        elapsed = min(now - self._ticked, _LONGEST_TICK) if counts else 0.0
        self._ticked = now
        content = self._file.read_bytes()
        if content != self._last:
            self._last, self._elapsed = content, 0.0
            return None
        self._elapsed += elapsed
        beat = _unpack(content)
        return beat if 0.0 < beat.limit <= self._elapsed else None


class _Limits:
    """How long each phase may last."""

    def __init__(self, timeout: Timeout) -> None:
        self._timeout = timeout
        self._last: defaultdict[Phase, deque[float]] = defaultdict(
            lambda: deque(maxlen=_REMEMBERED)
        )

    def add(self, phase: Phase, seconds: float) -> None:
        """Remember how long a phase took."""
        self._last[phase].append(seconds)

    def of(self, phase: Phase) -> float:
        """Seconds that the phase may last; 0 for no limit."""
        if self._timeout is None:
            return 0.0
        if self._timeout != "auto":
            return self._timeout * ALLOWANCES[phase]
        longest = max(self._last[phase], default=0.0)
        return max(_AUTO_SECONDS * ALLOWANCES[phase], _AUTO_FACTOR * longest)


def expect_beats(file: Path, timeout: Timeout) -> None:
    """Create a worker's file, from which on its start is timed."""
    file.write_bytes(_pack(Beat(0, _Limits(timeout).of("start"), 0, "start")))


def read_beat(file: Path) -> Beat:
    """A worker's last beat."""
    return _unpack(file.read_bytes())


def stacks_file(file: Path) -> Path:
    """Where a worker writes its stacks; exists once it can."""
    return file.with_suffix(".stacks")


def _pack(beat: Beat) -> bytes:
    return _RECORD.pack(beat.count, beat.limit, beat.step, beat.phase.encode())


def _unpack(content: bytes) -> Beat:
    count, limit, step, phase = _RECORD.unpack(content)
    return Beat(count, limit, step, cast(Phase, phase.rstrip(b"\0").decode()))
