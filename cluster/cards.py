"""The GPUs that `finray plan` knows: vendors' figures of dense arithmetic."""

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass

from ..training.common.errors import InputError

NODE = 8
"""GPUs of a node, at most."""
_MOST = 4096
"""GPUs of a plan, at most."""


@dataclass(frozen=True)
class Card:
    """A kind of GPU."""

    name: str
    title: str
    gib: float
    """Memory that processes get, in GiB: a little less than the vendor's gigabytes."""
    tflops: float
    """Dense 16-bit matrix products with sums in float32, in 10^12 operations a second."""
    bandwidth: float
    """Speed of its memory, in 10^12 bytes a second."""
    link: float
    """To the other GPUs of a node, one way, in 10^9 bytes a second."""
    has_bfloat16: bool = True

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        return round(self.gib * 2**30)


CARDS = {
    card.name: card
    for card in (
        Card("a100-40", "A100 40 GB", 39.4, 312, 1.56, 300),
        Card("a100", "A100 80 GB", 79.2, 312, 2.04, 300),
        Card("h100", "H100 80 GB", 79.2, 989, 3.35, 450),
        Card("h200", "H200 141 GB", 139.8, 989, 4.8, 450),
        Card("b200", "B200 180 GB", 178.3, 2250, 7.7, 900),
        Card("l4", "L4 24 GB", 22.0, 121, 0.30, 16),
        Card("l40s", "L40S 48 GB", 44.4, 362, 0.864, 32),
        Card("rtx4090", "RTX 4090 24 GB", 23.5, 165, 1.01, 16),
        Card("rtx5090", "RTX 5090 32 GB", 31.4, 210, 1.79, 32),
        Card("pro6000", "RTX PRO 6000 96 GB", 95.0, 503, 1.79, 32),
        Card("t4", "T4 16 GB", 14.6, 65, 0.32, 16, has_bfloat16=False),
    )
}
_OTHER_NAMES = {"a10080": "a100", "a10080gb": "a100", "a10040gb": "a100-40", "a10040": "a100-40"}


def parse_gpus(text: str) -> tuple[Card, int]:
    """The card and the number of `h100`, `h100:8` or `rtx-4090:2`.

    Raises:
        InputError: there is no such card, and the nearest is named; or no number behind the colon.
    """
    if not isinstance(text, str):  # a program's
        raise InputError(f"gpu: expected a card and how many, such as 'h100:8'; found {text!r}")
    name, separator, number = text.partition(":")
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    plain = plain.removeprefix("nvidia").replace("geforce", "")
    names = {re.sub(r"[^a-z0-9]", "", card): card for card in CARDS} | _OTHER_NAMES
    names |= {digits: card for card in CARDS if (digits := card.removeprefix("rtx")) != card}
    if plain not in names:
        near = _nearest(plain, names)
        hint = f"; did you mean {names[near]}?" if near else ""
        raise InputError(f"--gpu {text}: there is no such card{hint} ({', '.join(CARDS)})")
    if separator and not (number.isdecimal() and 1 <= int(number) <= _MOST):
        raise InputError(
            f"--gpu {text}: expected the number of GPUs, 1 to {_MOST}, behind the colon: {name}:8"
        )
    return CARDS[names[plain]], int(number) if separator else 1


def _nearest(text: str, names: Collection[str]) -> str | None:
    """The name most like a text: one that it begins with and says more to, else any close one."""
    start = max((name for name in names if text.startswith(name)), key=len, default="")
    alike = [name for name in names if name.startswith(start)]
    near = difflib.get_close_matches(text, alike, 1, 0.0 if start else 0.5)
    return near[0] if near else None


def link_of(card: Card, workers: int) -> float:
    """Bytes a second that each of these workers exchanges with the others."""
    return 1e9 * (card.link if workers <= NODE else min(card.link, 50.0))
