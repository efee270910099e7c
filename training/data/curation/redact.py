"""Masks personal data, which it knows by patterns."""

import ipaddress
import re
from collections.abc import Callable, Sequence

from ...config.curation import PersonalData, RedactStage
from ..shapes import RowError
from .stage import KEPT, Apply, Item, Outcome, StageContext
from .texts import rewritten

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
_IP = re.compile(
    r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)"
    r"|(?<![\w.:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]|\.\d)"
)
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+\d{1,3}(?:[ .-]?\(\d{1,4}\))?(?:[ .-]?\d{2,5}){2,5}"  # +49 (30) 123 456
    r"|\(\d{2,5}\)[ .-]?\d{3,4}(?:[ .-]?\d{2,5}){1,2}"  # (555) 123-4567
    r"|\d{3}([ .-])\d{3}\1\d{4}"  # 555-123-4567
    r")(?![\w-])"
)
_LEAST_GROUPS = 3
"""Of an address of version 6; what has fewer is rather code."""
_MARKS: dict[PersonalData, re.Pattern[str]] = {
    "email": re.compile("@"),
    "phone": re.compile(r"\d\d"),
    "card": re.compile(r"\d\d"),
    "ip": re.compile(r"[.:][0-9A-Fa-f:]"),
}
"""What a text has in any case that holds such data: looked for first, as it is fast."""


def redact(settings: RedactStage, context: StageContext) -> Apply:
    """The stage at work."""
    kinds = [kind for kind in _ORDER if kind in settings.of]

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
            return Outcome(dropped=f"holds {next(kind for kind in _ORDER if kind in held)}")
        return Outcome(row=row)

    return apply


def mask(text: str, kind: PersonalData) -> str:
    """The text with a mark in the place of each piece of data; the same object without any."""
    if not _MARKS[kind].search(text):
        return text
    pattern, is_real = _KINDS[kind]
    masked = pattern.sub(lambda match: f"[{kind}]" if is_real(match[0]) else match[0], text)
    return text if masked == text else masked


def _is_card(text: str) -> bool:
    """True if the digits have the check digit of a card (Luhn)."""
    digits = [int(letter) for letter in text if letter.isdecimal()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(set(digits)) > 1 and (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def _is_address(text: str) -> bool:
    if ":" in text and sum(map(bool, text.split(":"))) < _LEAST_GROUPS:
        return False
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_loopback)


def _is_phone(text: str) -> bool:
    return 7 <= sum(letter.isdecimal() for letter in text) <= 15


_KINDS: dict[PersonalData, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "email": (_EMAIL, lambda _: True),
    "card": (_CARD, _is_card),
    "ip": (_IP, _is_address),
    "phone": (_PHONE, _is_phone),
}
_ORDER = list(_KINDS)
"""A card's number comes before a telephone's, as it is longer."""
