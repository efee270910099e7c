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
    def gigabytes(self) -> int:
        """Memory as its title has it."""
        return int(self.title.split()[-2])

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
        Card("h100-pcie", "H100 PCIe 80 GB", 79.2, 756, 2.0, 64),
        Card("h100-nvl", "H100 NVL 94 GB", 93.1, 835, 3.9, 300),
        Card("h200", "H200 141 GB", 139.8, 989, 4.8, 450),
        Card("b200", "B200 180 GB", 178.3, 2250, 7.7, 900),
        Card("l4", "L4 24 GB", 22.0, 121, 0.30, 16),
        Card("l40", "L40 48 GB", 44.4, 181, 0.864, 32),
        Card("l40s", "L40S 48 GB", 44.4, 362, 0.864, 32),
        Card("a10g", "A10G 24 GB", 22.0, 70, 0.60, 16),
        Card("a40", "A40 48 GB", 44.4, 150, 0.696, 32),
        Card("a6000", "RTX A6000 48 GB", 47.4, 155, 0.768, 32),
        Card("rtx6000ada", "RTX 6000 Ada 48 GB", 47.4, 364, 0.96, 32),
        Card("rtx3090", "RTX 3090 24 GB", 23.6, 71, 0.936, 16),
        Card("rtx4090", "RTX 4090 24 GB", 23.5, 165, 1.01, 16),
        Card("rtx5090", "RTX 5090 32 GB", 31.4, 210, 1.79, 32),
        Card("pro6000", "RTX PRO 6000 96 GB", 95.0, 503, 1.79, 32),
        Card("v100-16", "V100 16 GB", 15.7, 125, 0.90, 150, has_bfloat16=False),
        Card("v100", "V100 32 GB", 31.7, 125, 0.90, 150, has_bfloat16=False),
        Card("t4", "T4 16 GB", 14.6, 65, 0.32, 16, has_bfloat16=False),
    )
}
_BESIDE = re.compile(
    r"nvidia|tesla|geforce|quadro|sxm\d?|pcie|nvl|hbm\d?e?|blackwell|generation|edition|server|"
    r"workstation|max|q"
)
"""Words that drivers write beside a card's name."""
_KINDS = ("nvl", "pcie")
"""Those that make another card of some: an H100 NVL has more memory than an H100."""
_COUNTED = (
    re.compile(r"\s*(?P<number>\d+)\s*[x*:]\s*(?P<name>\S.*)", re.IGNORECASE),
    re.compile(r"\s*(?P<name>.*\S)\s*[x*]\s*(?P<number>\d+)\s*", re.IGNORECASE),
)
"""8xh100 and h100x8, which are written h100:8."""
_SLICE = re.compile(r"\bmig\b|\b\d+g\.\d+gb\b")
"""A part of a card has such a name: MIG 1g.10gb."""
_SERIES = re.compile(r"(?P<letters>[a-z ]*)(?P<number>\d+)")
_SIZE = r"(\d+)(?:g|gb|gib)?"
_LIKE = 0.1
"""Two sizes of memory that differ by this share are one: of 80 GB a driver may call 81."""


def parse_gpus(text: str) -> tuple[Card, int]:
    """The card and the number of `h100`, `h100:8`, `rtx-4090:2` or `NVIDIA A100-SXM4-80GB`.

    Raises:
        InputError: there is no such card, and the nearest is named; or no number behind the colon.
    """
    if not isinstance(text, str):  # a program's
        raise InputError(f"gpu: expected a card and how many, such as 'h100:8'; found {text!r}")
    name, separator, number = map(str.strip, text.partition(":"))
    if _SLICE.search(name.lower()):
        raise InputError(f"--gpu {text}: a plan takes whole cards, and no MIG slices of one")
    card = _named(name)
    if card is None:
        near = _rewritten(text) or _nearest(_own_words(name))
        hint = f"; did you mean {near}?" if near else ""
        raise InputError(f"--gpu {text}: there is no such card{hint} ({', '.join(CARDS)})")
    if separator and not _is_count(number):
        raise InputError(
            f"--gpu {text}: expected the number of GPUs, 1 to {_MOST}, behind the colon: {name}:8"
        )
    return card, int(number) if separator else 1


def _own_words(name: str) -> list[str]:
    """The words of a name without those that drivers write beside it."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return [word for word in words if not _BESIDE.fullmatch(word)]


def _named(name: str) -> Card | None:
    own = _own_words(name)
    kind = [word for word in re.findall(r"[a-z0-9]+", name.lower()) if word in _KINDS]
    return _card("".join([*own[:1], *kind, *own[1:]])) or _card("".join(own))


def _rewritten(text: str) -> str | None:
    """`h100:8` for 8xh100 and h100x8."""
    for pattern in _COUNTED:  # 4090x2 is both
        match = pattern.fullmatch(text)
        if match and (card := _named(match["name"])) and _is_count(match["number"]):
            return f"{card.name}:{int(match['number'])}"
    return None


def _is_count(number: str) -> bool:
    return number.isdecimal() and len(number) < 10 and 1 <= int(number) <= _MOST


def _names() -> dict[str, list[Card]]:
    """The cards of each name, with and without rtx, whatever their memory; longer names first."""
    names: dict[str, list[Card]] = {}
    for card in CARDS.values():
        own = card.name.partition("-")[0]
        digits = own.removeprefix("rtx")
        for name in {own, digits, f"rtx{digits}", card.name.replace("-", "")}:
            names.setdefault(name, []).append(card)
    return dict(sorted(names.items(), key=lambda item: -len(item[0])))


def _card(plain: str) -> Card | None:
    """The card of a name, with the memory behind it, or that which its name alone stands for."""
    for name, cards in _names().items():
        if (match := re.fullmatch(f"{name}(?:{_SIZE})?", plain)) is None:
            continue
        fitting = cards if match[1] is None else _like(cards, int(match[1]))
        if fitting:
            return min(fitting, key=lambda card: "-" in card.name)
    return None


def _like(cards: Collection[Card], gigabytes: int) -> list[Card]:
    return [card for card in cards if abs(card.gigabytes / max(gigabytes, 1) - 1) <= _LIKE]


def _nearest(words: list[str]) -> str | None:
    """The card of the same number whose name is most like these words; one of their memory, if they
    say how much."""
    plain = "".join(words)
    size = re.search(r"(\d+)(?:gb|gib)$", plain)
    alike = _like(CARDS.values(), int(size[1])) if size else []
    start = max((name for name in _names() if plain.startswith(name)), key=len, default="")
    of_start = _names().get(start, ())
    chosen = [
        card
        for card in alike or CARDS.values()
        if (card.name.startswith(start) or card in of_start)
        and _is_of_series(" ".join(words), card)
    ]
    if not chosen:
        return None
    if size and start and not alike:
        chosen = [min(chosen, key=lambda card: abs(card.gigabytes - int(size[1])))]
    names = [card.name for card in chosen]
    near = difflib.get_close_matches(plain, names, 1, 0.0 if alike or start else 0.6)
    return near[0] if near else None


def _is_of_series(name: str, card: Card) -> bool:
    """True if a name has the card's number behind its letter: of rtx and pro, which are longer, one
    may be misspelt."""
    typed, own = _SERIES.match(name), _SERIES.match(card.name)
    if typed is None or own is None or typed["number"] != own["number"]:
        return False
    letters, of_card = (match["letters"].replace(" ", "") for match in (typed, own))
    if letters.removeprefix("rtx") == of_card.removeprefix("rtx"):
        return True
    return min(len(letters), len(of_card)) > 1


def link_of(card: Card, workers: int) -> float:
    """Bytes a second that each of these workers exchanges with the others."""
    return 1e9 * (card.link if workers <= NODE else min(card.link, 50.0))
