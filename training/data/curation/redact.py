"""Masks personal data, which it knows by patterns."""

import ipaddress
import re
from collections.abc import Callable, Sequence

from ...config.curation import PersonalData, RedactStage
from ..shapes import RowError
from .stage import KEPT, Apply, Item, Outcome, StageContext
from .texts import rewritten

_JOINTS = " \u00a0\u202f\u2010\u2011-"
"""Stand between groups of digits: spaces and hyphens, and those at which no line breaks."""
_LOCAL = r"0-9A-Z_a-z.+%\u00c0-\u024f\u0370-\u0587\u05d0-\u05ea\u0620-\u064a-"
"""Of a mail's name: no letters of scripts without spaces, as those before it are another word."""
_EMAIL = re.compile(
    rf"(?<![{_LOCAL}])[{_LOCAL}]{{1,64}}@(?:[\w-]{{1,63}}\.){{1,8}}"
    r"(?:xn--[0-9A-Za-z-]{2,59}|[A-Za-z]{2,24}|[^\W\d_]{2,24})(?![0-9A-Za-z])"
)
_CARD = (
    rf"(?<![0-9A-Za-z.+-])(?:\d{{13,19}}|\d{{4}}([{_JOINTS}])\d{{4}}\1\d{{4}}\1\d{{4}}%s"
    rf"|\d{{4}}([{_JOINTS}])\d{{6}}\2\d{{4,5}})(?![0-9A-Za-z]|[.-]\d)"
)
_CARDS = (re.compile(_CARD % r"\1\d{3}"), re.compile(_CARD % ""))
"""With 19 digits in groups, and with fewer: three digits that follow may be its security code."""
_IP = re.compile(
    r"(?<![0-9A-Za-z.])(?:\d{1,3}\.){3}\d{1,3}(?![0-9A-Za-z]|\.\d)"
    r"|(?<![0-9A-Za-z.:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![0-9A-Za-z:]|\.\d)"
)
_PHONE = re.compile(
    r"(?<![0-9A-Za-z.+-])(?:"
    r"\+[1-9]\d{0,2}(?:J?\(\d{1,4}\))?(?:J?\d{1,5}+){2,5}+"  # +49 (30) 123 456, +33 6 12 34 56 78
    r"|(?:1J)?\((?!(?:19|20)\d\d\))\d{2,5}\)J?\d{3,4}(?:J?\d{2,5}+){1,2}+"  # (555) 123-4567
    r"|(?:1J)?\d{3}(J)\d{3}\1\d{4}"  # 555-123-4567
    r")(?!\d|[.-]\d)".replace("J", f"[.{_JOINTS}]")
)
_LEAST_GROUPS = 3
"""Of an address of version 6; fewer are rather code, unless they begin as fe80 and 2001 do."""
_NETWORK = re.compile(r"(?=.{0,3}\d)[0-9A-Fa-f]{4}:")
_NO_CARDS = frozenset({0, 1, 7})
"""First digits that no cards have."""
_SHORT_CARD, _OF_SHORT = 13, 4
"""Digits of the shortest cards, and what they begin with."""
_MARKS: dict[PersonalData, re.Pattern[str]] = {
    "email": re.compile("@"),
    "phone": re.compile(r"\d\d"),
    "card": re.compile(r"\d\d"),
    "ip": re.compile(r"[.:][0-9A-Fa-f:]"),
}
"""What a text has in any case that holds such data: looked for first, as it is fast."""


def redact(settings: RedactStage, context: StageContext) -> Apply:
    """The stage at work."""
    kinds = [kind for kind in ALL_KINDS if kind in settings.of]

    def apply(items: Sequence[Item]) -> list[Outcome]:
        return [_outcome(item) for item in items]

    def _outcome(item: Item) -> Outcome:
        held: set[str] = set()

        def change(text: str) -> str:
            for kind in kinds:
                masked = mask(text, kind)
                if masked is not text:
                    held.add(kind)
                text = masked
            return text

        try:
            row = rewritten(item.row, change)
        except RowError as error:
            return Outcome(bad=str(error))
        if not held:
            return KEPT
        if settings.drop:
            return Outcome(dropped=f"holds {next(kind for kind in ALL_KINDS if kind in held)}")
        return Outcome(row=row)

    return apply


def mask(text: str, kind: PersonalData) -> str:
    """The text with a mark in the place of each piece of data; the same object without any."""
    if _MARKS[kind].search(text):
        patterns, is_real = _KINDS[kind]
        for pattern in patterns:
            text = _masked(text, pattern, is_real, f"[{kind}]")
    return text


def _masked(text: str, pattern: re.Pattern[str], is_real: Callable[[str], bool], mark: str) -> str:
    parts = []
    done = place = 0
    while (match := pattern.search(text, place)) is not None:
        place = match.start() + 1  # a part of what is none may be one
        if is_real(match[0]):
            parts += [text[done : match.start()], mark]
            done = place = match.end()
    return "".join([*parts, text[done:]]) if parts else text


def _is_card(text: str) -> bool:
    """True if the digits have the check digit of a card (Luhn), and begin as cards do."""
    digits = [int(letter) for letter in text if letter.isdecimal()]
    if digits[0] in _NO_CARDS or (len(digits) == _SHORT_CARD and digits[0] != _OF_SHORT):
        return False  # times in milliseconds, ISBNs
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def _is_address(text: str) -> bool:
    groups = sum(map(bool, text.split(":")))
    if ":" in text and groups < _LEAST_GROUPS and not _NETWORK.match(text):
        return False
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_loopback)


def _is_phone(text: str) -> bool:
    return 7 <= sum(letter.isdecimal() for letter in text) <= 15


_KINDS: dict[PersonalData, tuple[tuple[re.Pattern[str], ...], Callable[[str], bool]]] = {
    "email": ((_EMAIL,), lambda _: True),
    "card": (_CARDS, _is_card),
    "ip": ((_IP,), _is_address),
    "phone": ((_PHONE,), _is_phone),
}
ALL_KINDS = list(_KINDS)
"""As texts are masked: a card's number comes before a telephone's, as it is longer."""
