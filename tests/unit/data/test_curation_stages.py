"""What single stages do to texts."""

import random
from typing import Any, get_args

import pytest

from finray.training.config.curation import PersonalData
from finray.training.data.curation.filtering import has_tokens, repetition
from finray.training.data.curation.mixing import mixed_weights
from finray.training.data.curation.normalise import normal_form
from finray.training.data.curation.redact import mask
from finray.training.data.curation.texts import rewritten

KINDS: tuple[PersonalData, ...] = get_args(PersonalData)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to ada.b+c@mail.example.org.", "write to [email]."),
        ("<ada@mail.example>", "<[email]>"),
        ("git@host and @handle, a@b", None),
        ("4111 1111 1111 1111, 4111-1111-1111-1111", "[card], [card]"),
        ("4111 1111 1111 1112", None),
        ("0000 0000 0000 0000", None),
        ("id 4111111111111111x", None),
        ("from 10.1.2.3: ok", "from [ip]: ok"),
        ("10.1.2.3.4, 300.1.2.3, 127.0.0.1, v1.2.3", None),
        ("at 2001:db8::8a2e:370:7334", "at [ip]"),
        ("12:30:45, std::vector, a::, ::", None),
        ("call +49 (30) 123 4567 or +1-555-123-4567", "call [phone] or [phone]"),
        ("(555) 123-4567 / 555.123.4567", "[phone] / [phone]"),
        ("on 2024-01-31, 1,234,567, 3.14159265, 123 456 789", None),
        ("sum = 12345678901234567890", None),
        ("送信はada@mail.exampleまで、4111111111111111です", "送信は[email]まで、[card]です"),
        ("サーバ10.1.2.3は+81 3-1234-5678へ", "サーバ[ip]は[phone]へ"),
        (
            "*ada@mail.example*, ada@mail.example--, ada@mail.xn--p1ai",
            "*[email]*, [email]--, [email]",
        ),
        (f"{'文' * 80}jörg@mail.example{'文' * 80}", f"{'文' * 80}[email]{'文' * 80}"),
        ("4111 1111 1111 1111 12/27 123, 4111 1111 1111 1111 123", "[card] 12/27 123, [card] 123"),
        ("2025 4111 1111 1111 1111, 12 4111111111111111 9", "2025 [card], 12 [card] 9"),
        ("3782 822463 10005, 4111\u00a01111\u00a01111\u00a01111", "[card], [card]"),
        ("at 1606780800003 ms, isbn 9783161484100, 1 2 3 4 5 6 7 8 9 0 1 2 3 7", None),
        ("+33 6 12 34 56 78, +33 (0) 6 12 34 56 78", "[phone], [phone]"),
        (
            "1-800-555-0199, +1 (555) 123\u20114567, +1 555 123 4567x5",
            "[phone], [phone], [phone]x5",
        ),
        ("J. Chem. (1999) 123-145, +0100 123 4567, 555-123-4567-89", None),
        ("fe80::1, 2001:db8::/32 and a::b, face::b", "[ip], [ip]/32 and a::b, face::b"),
        ("(+49) 30/123456, 650\u2013253\u20130000, 1 555 123 4567", "[phone], [phone], [phone]"),
        (
            "\uff0b81-3-3224-9999, +\u0669\u0666\u0666 \u0665\u0660 \u0661\u0662\u0663\u0664",
            "[phone], [phone]",
        ),
        ("100 200 3000, 640 480 1024 5, 3 +1234567", None),
        ("Call 415 555 2671 24/7, ring 020 794 6095", "Call [phone] 24/7, ring [phone]"),
        ("room 7 415 555 2671 at 2 pm", "room 7 [phone] at 2 pm"),
        (
            "client version 203.0.113.9, Subversion 198.51.100.2",
            "client version [ip], Subversion [ip]",
        ),
        ("8600140412345671, 3841000412345677", "[card], [card]"),
        ("version 1.2.3.4, Release 1.2.3.4, pkg==1.2.3.4, section 1.1.1.1, mask 255.255.0.0", None),
        (
            "git@host.example:owner/name.git, but git@lists.example",
            "git@host.example:owner/name.git, but [email]",
        ),
        (
            "Tel. 030 12345678, 0170 1234567 / 0171-7654321; 030/1234567, 089 / 12 34 56 78.",
            "Tel. [phone], [phone] / [phone]; [phone], [phone].",
        ),
        (
            "01 42 68 53 00 (01.42.68.53.00), 020 7946 0958, 01632 960123, 08-123 456 78",
            "[phone] ([phone]), [phone], [phone], [phone]",
        ),
        (
            "044 668 18 00 or 0470 12 34 56, 0664 1234567, 06-12345678, 090-1234-5678",
            "[phone] or [phone], [phone], [phone], [phone]",
        ),
        (
            "03 12 25 33 41, 01 02 03 04 05, 01.02.2024, 01 02 2024 10 30, 09 20240131, "
            "05 2023 2024, 08:30 12345678",
            None,
        ),
        ("0930 12 05 24, 0.05 12345678, 0,05 12345678, 7 030 12345678, 030 12345678 7", None),
        (
            "01067 10115, 02134-1234, 0900 1030 1200, 010.001.002.003, 0-306-40615-2, 0012345678",
            None,
        ),
        ("v01.23.45.67.89.1, A030 12345678, #0170 1234567, 030 12345678kg, 0815 4711", None),
        ("mu\u0308ller@bu\u0308cher.example", "[email]"),
        (
            "orders 9012345678901238 and 901234567890123453, 6011000000000004",
            "orders 9012345678901238 and 901234567890123453, [card]",
        ),
    ],
)
def test_redact(text: str, masked: str | None) -> None:
    result = text
    for kind in ("email", "card", "ip", "phone"):
        result = mask(result, kind)  # type: ignore[arg-type]
    assert result == (text if masked is None else masked)
    assert (result is text) == (masked is None)


def test_masks_hold_nothing_to_mask() -> None:
    for kind in KINDS:
        for other in KINDS:
            assert mask(f"a [{other}] b", kind) == f"a [{other}] b"


def test_masking_long_texts_takes_little_time() -> None:
    for text in (
        "a." * 50_000,
        "1 " * 50_000,
        "::" * 50_000,
        "a@" * 50_000,
        "+1 (2" * 20_000,
        "+1 2" * 20_000,
        "+1234567890" * 9_000,
        "\u0660" * 100_000,
        "git@a:" * 20_000,
        "415 555 2671 " * 20_000,
        "030 12345678 " * 20_000,
        "01 42 68 53 " * 20_000,
        "01." * 50_000,
    ):
        for kind in KINDS:
            mask(text, kind)


@pytest.mark.parametrize(
    ("form", "text", "normal"),
    [
        ("NFC", "e\u0301", "é"),
        ("NFC", "ｆｕｌｌ ﬁ", "ｆｕｌｌ ﬁ"),
        ("NFKC", "ｆｕｌｌ ﬁ", "full fi"),
        ("NFC", "a\r\nb\rc\n\td\0\x1b[1m\x7f", "a\nb\nc\n\td[1m"),
    ],
)
def test_normal_form(form: str, text: str, normal: str) -> None:
    assert normal_form(text, form) == normal
    assert normal_form(normal, form) is normal


def test_names_and_roles_are_not_texts() -> None:
    row = {
        "messages": [
            {"role": "a", "content": "a", "tool_calls": [{"id": "a", "function": {"name": "a"}}]}
        ],
        "n": 1,
        "other": [["a"], None],
    }
    changed = rewritten(row, str.upper)
    assert changed["messages"][0]["role"] == "a" and changed["messages"][0]["content"] == "A"
    assert changed["messages"][0]["tool_calls"] == row["messages"][0]["tool_calls"]  # type: ignore[index]
    assert changed["other"] == [["A"], None] and changed["n"] == 1
    assert rewritten(row, lambda text: text) is row


def test_repetition_is_that_of_the_worst_text() -> None:
    draw = random.Random(0)
    plain = " ".join(str(draw.random()) for _ in range(50))
    shares = repetition([[plain], [plain, "a b c d e " * 10], ["a a a"], [], [""]])
    assert shares.tolist() == [0.0, pytest.approx(1 - 5 / 46), 0.0, 0.0, 0.0]


def test_tokens_are_counted_as_if_all_were(tokenizer: Any) -> None:
    draw = random.Random(1)
    texts = ["one " * draw.randrange(40) + "z" * draw.randrange(60) for _ in range(300)]
    texts += ["", "\udc80", " " * 5000, "x" * 5000]
    for least in (1, 7, 20):
        counts = [
            len(
                tokenizer(
                    text.encode("utf-8", "replace").decode(), add_special_tokens=False
                ).input_ids
            )
            for text in texts
        ]
        assert has_tokens(texts, least, tokenizer) == [count >= least for count in counts]


@pytest.mark.parametrize(
    ("rows", "temperature", "shares"),
    [
        ((100, 900), 1.0, (0.1, 0.9)),
        ((100, 900), 0.5, (0.25, 0.75)),
        ((100, 900), 0.0, (0.5, 0.5)),
        ((0, 10, 30), 0.0, (0.0, 0.5, 0.5)),
    ],
)
def test_weights(rows: tuple[int, ...], temperature: float, shares: tuple[float, ...]) -> None:
    weights = mixed_weights(rows, temperature)
    used = [weight * size for weight, size in zip(weights, rows, strict=True)]
    assert sum(used) == pytest.approx(sum(rows), rel=1e-4)
    assert [size / sum(used) for size in used] == pytest.approx(shares, abs=1e-4)
