"""A progress that a test can read."""

from finray.training.common.progress import Progress


class RecordedProgress(Progress):
    """Keeps every status and advance."""

    def __init__(self) -> None:
        self.statuses: list[str] = []
        self.advances: list[tuple[int, int]] = []

    def status(self, text: str) -> None:
        self.statuses.append(text)

    def advance(self, done: int, total: int) -> None:
        self.advances.append((done, total))
