"""A request to stop, from a signal handler to whoever runs the training."""

import threading


class Stop:
    """`armed` while a stop would be answered with a save; `requested` once somebody asked."""

    def __init__(self) -> None:
        self.requested = threading.Event()
        self.armed = False
