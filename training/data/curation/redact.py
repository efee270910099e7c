"""Masks personal data, which it knows by patterns."""

import ipaddress
import re
from collections.abc import Callable, Sequence

from ...config.curation import PersonalData, RedactStage
from ..shapes import RowError
from .stage import KEPT, Apply, Item, Outcome, StageContext
from .texts import rewritten

_SPACES = " \u00a0\u2007\u2009\u202f"
_JOINTS = f"{_SPACES}\u2010-\u2013\u2212-"
"""Stand between groups of digits: spaces, hyphens and what text programs write in their place."""
_ACCENTS = r"\u0300-\u036f"
"""Of letters that are written as two characters."""
_LOCAL = rf"0-9A-Z_a-z.+%\u00c0-\u024f{_ACCENTS}\u0370-\u0587\u05d0-\u05ea\u0620-\u064a-"
"""Of a mail's name: no letters of scripts without spaces, as those before it are another word."""
_EMAIL = re.compile(
    rf"(?<![{_LOCAL}])(?!git@[\w.-]+:\w)[{_LOCAL}]{{1,64}}@(?:[\w{_ACCENTS}-]{{1,63}}\.){{1,8}}"
    r"(?:xn--[0-9A-Za-z-]{2,59}|[A-Za-z]{2,24}|[^\W\d_]{2,24})(?![0-9A-Za-z])"
)
_CARD = (
    rf"(?<![\dA-Za-z.+-])(?:\d{{13,19}}|\d{{4}}([{_JOINTS}])\d{{4}}\1\d{{4}}\1\d{{4}}%s"
    rf"|\d{{4}}([{_JOINTS}])\d{{6}}\2\d{{4,5}})(?![\dA-Za-z]|[.-]\d)"
)
_CARDS = (re.compile(_CARD % r"\1\d{3}"), re.compile(_CARD % ""))
"""With 19 digits in groups, and with fewer: three digits that follow may be its security code."""
_IP = re.compile(
    # Numbers of versions are small.
    r"(?<![0-9A-Za-z.])(?=\d)(?:(?<!==)(?<!\b(?i:version|release|section) )"
    r"|(?!(?:[12]?\d\.){3}[12]?\d(?!\d)))"
    r"(?:\d{1,3}\.){3}\d{1,3}"
    r"(?![0-9A-Za-z]|\.\d)"
    r"|(?<![0-9A-Za-z.:])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![0-9A-Za-z:]|\.\d)"
)
_PHONE = re.compile(
    r"(?=[\d(+\uff0b])(?<![\dA-Za-z.+-])(?:"
    # +49 (30) 123 456, (+49) 30/123456, +33 6 12 34 56 78; also with a wide plus sign
    r"(?:\([+\uff0b](?!0)\d{1,3}\)|[+\uff0b](?!0)\d{1,3})(?:J?\(\d{1,4}\))?(?:[/J]?\d{1,5}+){2,5}+"
    r"|(?:1J)?\((?!(?:19|20)\d\d\))\d{2,5}\)J?\d{3,4}(?:J?\d{2,5}+){1,2}+"  # (555) 123-4567
    r"|(?:1J)?\d{3}(?!S)(J)\d{3}\1\d{4}"  # 555-123-4567
    # 555 123 4567, unless numbers follow to the end of the line, as in a table, or 30 of them
    r"|(?:1S)?[02-9]\d\dS\d{3}S\d{4}(?!(?:S\d+){1,30}+(?:$|[,;\r\n]|S\d))"
    r")(?!\d|[.-]\d)".replace("[/J]", f"[/.{_JOINTS}]")
    .replace("J", f"[.{_JOINTS}]")
    .replace("S", f"[{_SPACES}]")
)
_HYPHENS = r"\u2010-\u2013\u2212-"
_NATIONAL = re.compile(
    # 030 12345678, 030/1234567, 01 42 68 53 00, 08-123 456 78; no numbers stand beside it
    rf"(?<![0-9A-Za-z.+#_-])(?<!\d[,:/{_SPACES}])0[1-9]\d{{0,3}}+"
    rf"(?:[{_SPACES}]?[/{_HYPHENS}][{_SPACES}]?|[.{_SPACES}])\d{{2,8}}+"
    rf"(?:([.{_JOINTS}])\d{{2,4}}+(?:\1\d{{2,4}}+){{0,3}}+)?+"
    rf"(?![0-9A-Za-z_]|[,.:/{_JOINTS}]\d)"
)
"""A number that begins with the 0 of a country's own area codes."""
_SHAPES = {
    *((2, 8), (3, 7), (3, 8), (4, 6), (4, 7), (4, 8), (5, 6), (5, 7)),
    *((2, 3, 4), (2, 4, 4), (3, 3, 4), (3, 4, 4), (4, 3, 3), (4, 3, 4), (5, 3, 3)),
    *((2, 3, 2, 2), (2, 3, 3, 2), (3, 3, 2, 2), (4, 2, 2, 2), (4, 3, 2, 2)),
    *((2, 2, 2, 2, 2), (3, 2, 2, 2, 2)),
}
"""Digits of the groups of such numbers, as the countries of Europe and Asia write them."""
_DATE = re.compile(r"(?:19|20)\d\d(?:(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))?")
"""20240131, or the year alone."""
_LEAST_GROUPS = 3
"""Of an address of version 6; fewer are rather code, unless they begin as fe80 and 2001 do."""
_NETWORK = re.compile(r"(?=.{0,3}\d)[0-9A-Fa-f]{4}:")
_V4 = 4
_LEAST_TOGETHER = 8
"""Digits of a telephone number after a plus sign, without a gap: fewer are rather a sum."""
_CARD_NUMBER = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|5[1-5]\d{14}|2(?:20[0-4]|22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}"
    r"|3[47]\d{13}|3(?:0[0-5]|[689]\d)\d{11}|35\d{14}|(?:5[06-8]|6\d)\d{11,17}|8[12]\d{14}"
    r"|384\d{13}|(?:8600|9051|9792|9860)\d{12}"
)
"""Beginnings and lengths of cards' numbers, by their brands: times in milliseconds, ISBNs and most
numbers of orders have others."""
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
        for pattern, is_real in _KINDS[kind]:
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
    """True if the digits begin as a brand's cards do, and have their check digit (Luhn)."""
    digits = [int(letter) for letter in text if letter.isdecimal()]
    if not _CARD_NUMBER.fullmatch("".join(map(str, digits))):
        return False
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
    is_mask = address.version == _V4 and (address.is_reserved or address.is_multicast)
    return not (address.is_unspecified or address.is_loopback or is_mask)


def _is_phone(text: str) -> bool:
    digits = sum(letter.isdecimal() for letter in text)
    return (7 if len(text) > digits + 1 else _LEAST_TOGETHER) <= digits <= 15


def _is_national(text: str) -> bool:
    """True if the groups are those of a telephone number, and not of dates or a list of numbers."""
    groups = re.findall(r"\d+", text)
    shape = tuple(map(len, groups))
    if shape not in _SHAPES or any(map(_DATE.fullmatch, groups)):
        return False
    if "." in text or set(shape) == {2}:
        is_list = sorted(set(groups)) == groups or sum(group[0] == "0" for group in groups) > 3
        return set(shape) == {2} and not is_list
    return shape != (4, 2, 2, 2) or text.startswith("04")  # Belgium's; others are a time and a date


_Kinds = dict[PersonalData, tuple[tuple[re.Pattern[str], Callable[[str], bool]], ...]]
_KINDS: _Kinds = {
    "email": ((_EMAIL, lambda _: True),),
    "card": tuple((pattern, _is_card) for pattern in _CARDS),
    "ip": ((_IP, _is_address),),
    "phone": ((_PHONE, _is_phone), (_NATIONAL, _is_national)),
}
ALL_KINDS = list(_KINDS)
"""As texts are masked: a card's number comes before a telephone's, as it is longer."""
