"""Write the quickstart's data: support messages and the fields a shop wants from them.

The training and evaluation rows are chats: a customer's message, answered with one line of JSON.
The corpus for the base model shows the same world in other layouts and never as a chat or as that
JSON.  Every surname and every order number belongs to exactly one side, by a checksum: the
held-out ones occur in eval.jsonl only, and neither in train.jsonl nor in the corpus.

    python make_data.py                                    # train, eval and pairs.jsonl, here
    python make_data.py --corpus corpus.jsonl --rows 80000 # the corpus for the base model
"""

import argparse
import json
import random
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

FIELDS = ("name", "order", "item", "issue", "wants")
ANSWERED = ("name", "order", "issue", "wants")

FIRST_NAMES = """
Ada Adele Agnes Aino Alba Alma Amira Anouk Anton Ariane Arvid Astrid Aurelio Axel Beata Benno
Bianca Bjorn Bruno Camila Carla Casper Cecilia Clara Cosima Dagmar Dalia Damian Daria Dario Davide
Delia Dimitri Doreen Edda Edgar Elena Elias Elif Elin Elsa Emil Enzo Erika Esther Ewa Fabian Farid
Felix Fiona Flora Frida Gemma Gerda Gideon Gregor Greta Gustav Hana Hanno Hassan Hedda Helga Henrik
Hilda Hugo Ida Ilse Imani Ines Ingrid Irina Ivan Ivo Jakub Janek Jasmin Joana Jonas Josefa Judit
Julian Kaito Karin Katya Kenji Kerstin Kirsten Klara Kofi Lars Laszlo Leila Lena Leon Liesel Linus
Lorenzo Lucia Ludwig Luisa Magda Maja Malik Manuel Marek Marta Matteo Mei Milan Mina Mirela Moritz
Nadia Naomi Nasrin Nils Nina Noemi Nora Olga Oskar Otto Paloma Paula Pavel Petra Philippa Pia Priya
Rafael Ramona Renata Ricardo Roland Rosa Ruben Ruth Sabine Samir Sanna Selma Sergio Silke Simone
Sofia Stefan Sunita Sven Tamar Tarik Teresa Theo Tilda Tomas Uma Ursula Valeria Vera Viktor Vincent
Wanda Wilma Xavier Yara Yusuf Zara Zeno Zita
""".split()
SURNAME_STARTS = """
Al An Ash Bar Beck Berg Bor Brad Bran Cal Car Cor Dal Dan Dor Ek El Fal Far Fen Gar Gran Hal Har
Hart Hol Holm Jan Kar Kel Kir Lan Lind Lun Mal Mar Mel Mor Nor Nord Oster Pal Par Ram Rav Ros Sal
San Sel Sol Stan Sten Sund Tal Tor Val Var Ver Vin Wal Wes Win Zel
""".split()
SURNAME_ENDS = """
aki ardo berg bury by dal den der dez er erova ez feld ford gard grave ham ic inen ini ita ka koski
land ley lin lund man mann mark mont nik ova owski quist ren rup sen son stad strom tini ton uchi
ura vik wick worth wood
""".split()
ONSETS = "b br c ch d dr f fl g gr h j k kr l m n p pl r s sh st t tr v w y z".split()
VOWELS = "a a e e i i o o u ai au ea ei ie oa".split()
CODAS = ["", "", "", "n", "r", "l", "s", "m", "k", "nd", "rt", "x", "th", "ss", "ng"]
MONTHS = """January February March April May June July August September October November
December""".split()
CITIES = "Bergen Porto Leeds Graz Lyon Turku Ghent Cork Basel Gdansk Malmo Utrecht".split()
COLOURS = "black white blue green red grey yellow orange".split()

KITCHEN, TEXTILE, ELECTRIC, OUTDOOR = "kitchen", "textile", "electric", "outdoor"
MATERIALS = {
    KITCHEN: "ceramic steel copper glass enamel porcelain".split(),
    TEXTILE: "wool linen cotton knitted striped velvet".split(),
    ELECTRIC: "wireless portable compact bedside digital solar".split(),
    OUTDOOR: "folding wooden camping garden bamboo rattan".split(),
}
NOUNS = {
    KITCHEN: "teapot kettle jug bowl pan mug tray vase".split(),
    TEXTILE: "blanket scarf cushion jacket tablecloth sweater curtain rug".split(),
    ELECTRIC: "lamp radio speaker clock charger heater fan toaster".split(),
    OUTDOOR: "chair table bench lantern stool hammock basket shelf".split(),
}
PARTS = {
    KITCHEN: ["lid", "handle", "strainer"],
    TEXTILE: ["belt", "inner lining", "second button"],
    ELECTRIC: ["power cable", "remote control", "manual"],
    OUTDOOR: ["bag of screws", "fourth leg", "carrying bag"],
}

# A phrase says where the item stands with {it}, "the wool blanket" with or without the order.
ISSUES = {
    "damaged": [
        "{it} arrived broken",
        "{it} came damaged",
        "{it} was damaged on the way here",
        "when I opened the parcel, {it} was in pieces",
        "the box was crushed and so was {it}",
        "the courier must have dropped the parcel, because {it} is ruined",
        "I unpacked {it} and found it badly damaged",
        "there was damage all over {it} when it was delivered",
    ],
    "late": [
        "{it} still has not arrived",
        "I am still waiting for {it}",
        "{it} is more than {n} days overdue",
        "{it} should have been here on {date}, but nothing has come",
        "nobody has delivered {it} yet",
        "{it} was promised for last week and I have seen nothing of it",
        "it has been {n} weeks and there is no sign of {it}",
        "the tracking page for {it} has not moved for {n} days",
    ],
    "incomplete": [
        "{it} came without the {part}",
        "the {part} of {it} was not in the box",
        "{it} arrived, but the {part} is missing",
        "I opened the box of {it} and there was no {part}",
        "{it} is missing its {part}",
        "you forgot to pack the {part} that belongs to {it}",
        "I could not find the {part} anywhere in the parcel with {it}",
    ],
    "wrong": [
        "I ordered {it}, but you sent me {other}",
        "instead of {it} I got {other}",
        "I found {other} in the parcel and not {it}",
        "{other} turned up where {it} should have been",
        "you mixed something up, I bought {it} and received {other}",
        "I was expecting {it}, not {other}",
        "{it} was swapped for {other} by mistake",
    ],
    "overcharged": [
        "I was charged twice for {it}",
        "my card was billed two times for {it}",
        "you took {price} euros too much for {it}",
        "I paid more for {it} than the price on your page",
        "{it} was on sale, but you billed me the full price",
        "the invoice for {it} is {price} euros too high",
        "the discount for {it} was not taken off my bill",
    ],
}
FAULTY = {
    KITCHEN: ["{it} leaks", "water runs out of the bottom of {it}", "{it} rusted within {n} days"],
    TEXTILE: [
        "{it} lost its colour in the first wash",
        "the seams of {it} came apart after {n} days",
        "{it} shrank although I washed it cold",
    ],
    ELECTRIC: [
        "{it} does not switch on",
        "{it} stopped working after {n} days",
        "I cannot get {it} to work",
    ],
    OUTDOOR: [
        "{it} wobbles and will not stand straight",
        "{it} came apart after {n} days of normal use",
        "the paint on {it} peels off",
    ],
}
REQUESTS = {
    "refund": [
        "I would like my money back",
        "I want a refund",
        "please refund me",
        "can I have my money back?",
        "please pay the amount back to my card",
        "I am asking for a full refund",
        "could you return what I paid?",
        "just give me my money back, I do not need a new one",
    ],
    "replacement": [
        "please send me a new one",
        "I would like a replacement",
        "could you exchange it?",
        "can you ship me another one?",
        "please replace it",
        "I want it swapped for the right one in good order",
        "just send another one, I do not want a refund",
        "when can I expect a replacement?",
    ],
    "repair": [
        "can it be repaired?",
        "I would like to have it fixed",
        "please tell me where I can have it repaired",
        "could one of your people mend it?",
        "I would rather have it mended than replaced",
        "please fix it for me",
        "I am hoping for a repair under the guarantee",
    ],
    "update": [
        "can you tell me where it is?",
        "please let me know when it will come",
        "I just want to know what is going on",
        "could you check the status for me?",
        "please give me a new delivery date",
        "when will it get here?",
        "any news would be welcome",
    ],
    "cancel": [
        "please cancel the order",
        "I want to cancel",
        "I no longer need it, so cancel it",
        "can I still cancel?",
        "please call the whole order off",
        "I would like to withdraw from the purchase",
        "take it off my account, I have bought one elsewhere",
    ],
}
REQUESTS_OF = {
    "damaged": ["refund", "replacement", "repair"],
    "late": ["update", "update", "cancel", "refund"],
    "incomplete": ["refund", "replacement", "replacement", "cancel"],
    "wrong": ["refund", "replacement", "cancel"],
    "overcharged": ["refund", "refund", "cancel"],
    "faulty": ["refund", "replacement", "repair", "repair"],
}
ASIDES = [
    "I paid {price} euros for it.",
    "It was meant as a birthday present for {person}.",
    "I placed the order on {date}.",
    "I have been a customer for {n} years and this has never happened before.",
    "Your colleague {person} told me to write to this address.",
    "My neighbour {person} bought the same one on {date} and is happy with it.",
    "The invoice {number} is attached.",
    "I already called {n} times and nobody picked up.",
    "The shop in {city} could not help me.",
    "We are moving to {city} on {date}, so it is a bit urgent.",
    "The weather in {city} is lovely, by the way.",
    "I can send photos if you need them.",
    "The tracking code is {number}.",
    "You can reach me after {n} in the evening.",
    "Otherwise I am happy with your shop.",
    "{person} from the {city} branch knows about it.",
    "I hope you are all having a good week.",
    "My customer number is {number}.",
]
GREETINGS = """Hi|Hello|Hi there|Good morning|Good evening|Dear team|Hello everyone|Hey|Good day|
Dear support team|Good afternoon""".replace("\n", "").split("|")
INTROS = [
    "this is {name}",
    "my name is {name}",
    "{name} here",
    "I am {name}",
    "this is {name} from {city}",
]
ORDERED = [
    "my order number is {order}",
    "it is about order {order}",
    "the order is {order}",
    "I am writing about order {order}",
    "order {order} is giving me trouble",
    "I have a problem with my order {order}",
]
SIGN_OFFS = [
    "Best regards, {name}",
    "Thanks, {name}",
    "Kind regards,\n{name}",
    "Thank you!\n{name}",
    "Yours, {name}",
    "Many thanks\n{name}",
    "Cheers, {name}",
]
UNDER_NAME = [
    "The order is under the name {name}.",
    "It was booked under {name}.",
    "You will find it in the account of {name}.",
    "The parcel was addressed to {name}.",
]

# How many words each form of copying starts from.
SPAN = {"again": (3, 7), "lines": (1, 4), "look up": (3, 7)}


def is_held_out(word: str) -> bool:
    """True if a name or an order number belongs to the evaluation side only."""
    return zlib.crc32(word.encode()) % 5 == 0


@dataclass(frozen=True)
class Case:
    """One customer's message and the fields that a reader should take from it."""

    message: str
    fields: dict[str, str]


class World:
    """Draws people, numbers, items and messages from one side of the split."""

    def __init__(self, seed: int, *, held_out: bool = False, syllables: float = 0.0) -> None:
        """Seed the draws; ``syllables`` is the share of names made of random syllables."""
        self.rng = random.Random(seed)
        self.held_out = held_out
        self.syllables = syllables

    def on_this_side(self, draw: Callable[[], str]) -> str:
        """Draw until the word belongs to this side of the split."""
        while is_held_out(word := draw()) != self.held_out:
            pass
        return word

    def nonsense(self) -> str:
        """Return a capitalised word of one to three random syllables."""
        parts = [
            self.rng.choice(ONSETS) + self.rng.choice(VOWELS) + self.rng.choice(CODAS)
            for _ in range(self.rng.choice((1, 2, 2, 2, 3)))
        ]
        return "".join(parts).capitalize()

    def first_name(self) -> str:
        """Return a first name, which both sides share."""
        if self.rng.random() < self.syllables:
            return self.on_this_side(self.nonsense)
        while is_held_out(word := self.rng.choice(FIRST_NAMES)):
            pass
        return word

    def surname(self) -> str:
        """Return a surname of this side."""
        if self.rng.random() < self.syllables:
            return self.on_this_side(self.nonsense)
        return self.on_this_side(
            lambda: self.rng.choice(SURNAME_STARTS) + self.rng.choice(SURNAME_ENDS)
        )

    def name(self) -> str:
        """Return a full name of this side."""
        return f"{self.first_name()} {self.surname()}"

    def number(self) -> str:
        """Return a number of five or six digits of this side."""
        return self.on_this_side(lambda: str(self.rng.randrange(10_000, 1_000_000)))

    def item(self, kind: str) -> str:
        """Return an item of one kind, with a colour now and then."""
        item = f"{self.rng.choice(MATERIALS[kind])} {self.rng.choice(NOUNS[kind])}"
        return f"{self.rng.choice(COLOURS)} {item}" if self.rng.random() < 0.3 else item

    def price(self) -> str:
        """Return an amount of money."""
        return f"{self.rng.randrange(5, 200)}.{self.rng.choice(('00', '50', '90', '95'))}"

    def fill(self, phrase: str, **values: str) -> str:
        """Fill the placeholders of a phrase with ``values``, or with random draws."""
        draws: dict[str, Callable[[], str]] = {
            "price": self.price,
            "date": lambda: f"{self.rng.randrange(1, 29)} {self.rng.choice(MONTHS)}",
            "n": lambda: str(self.rng.randrange(2, 12)),
            "person": self.first_name,
            "number": self.number,
            "city": lambda: self.rng.choice(CITIES),
        }
        return re.sub(r"{(\w+)}", lambda m: values.get(m[1]) or draws[m[1]](), phrase)

    def complaint(self, kind: str, issue: str, item: str, order: str | None) -> str:
        """Say what is wrong with the item, naming the order on the way where one is given."""
        it = self.rng.choice(("the", "the", "my")) + f" {item}"
        if order:
            named = self.rng.choice((" from order {0}", " (order {0})", " in order {0}"))
            it += named.format(order)
        elif self.rng.random() < 0.2:
            it += " from your shop"
        while (other := self.item(self.rng.choice(list(NOUNS)))) == item:
            pass
        other = ("an " if other[0] in "aeiou" else "a ") + other
        phrases = FAULTY[kind] if issue == "faulty" else ISSUES[issue]
        part = self.rng.choice(PARTS[kind])
        return self.fill(self.rng.choice(phrases), it=it, other=other, part=part)

    def case(self) -> Case:
        """Write one message and note its fields."""
        rng = self.rng
        kind, issue = rng.choice(list(NOUNS)), rng.choice(list(REQUESTS_OF))
        request = rng.choice(REQUESTS_OF[issue])
        name, order, item = self.name(), self.number(), self.item(kind)
        order_at, name_at = rng.choice(("complaint", "own")), rng.choice(("intro", "end", "under"))
        trouble = self.complaint(kind, issue, item, order if order_at == "complaint" else None)
        body = self.body(trouble, rng.choice(REQUESTS[request]))
        opening = []
        if name_at == "intro":
            opening.append(self.fill(rng.choice(INTROS), name=name))
        if order_at == "own":
            place = rng.choice((opening, body))
            clause = rng.choice(ORDERED).format(order=order)
            place.append(clause if place is opening else sentence(clause))
        if name_at == "under":
            body.insert(rng.randrange(len(body) + 1), rng.choice(UNDER_NAME).format(name=name))
        if name_at == "end":
            body.append(rng.choice(SIGN_OFFS).format(name=name))
        message = self.open_with(opening) + " ".join(body)
        values = (name, order, item, issue, request)
        return Case(message, dict(zip(FIELDS, values, strict=True)))

    def body(self, trouble: str, wish: str) -> list[str]:
        """Return the sentences that say what is wrong and what is wanted, and asides."""
        rng = self.rng
        asides = [self.fill(aside) for aside in rng.sample(ASIDES, rng.choice((0, 0, 1, 1, 2)))]
        if not wish.endswith("?") and rng.random() < 0.3:
            link = "so" if wish.startswith("please") else rng.choice(("so", "and"))
            return [sentence(f"{trouble}, {link} {wish}"), *asides]
        if rng.random() < 0.2:
            return [sentence(wish), sentence(trouble), *asides]
        return [sentence(trouble), *asides, sentence(wish)]

    def open_with(self, opening: list[str]) -> str:
        """Write the first words of a message: a greeting, who writes, which order."""
        start = self.rng.choice((", ", " and ")).join(opening)
        if self.rng.random() < 0.3:
            return sentence(start) + " " if start else ""
        greeting = self.rng.choice(GREETINGS)
        return greeting + (f", {start}. " if start else self.rng.choice((",\n", ". ", "! ")))


def sentence(clause: str) -> str:
    """Return a clause with a capital in front and a stop at its end."""
    return clause[:1].upper() + clause[1:] + ("" if clause.endswith("?") else ".")


def card(world: World, fields: dict[str, str]) -> str:
    """Write the fields as a card, one a line or in one line."""
    rng = world.rng
    colon, between = rng.choice((": ", " = ", " - ", ":\n")), rng.choice(("\n", "\n", "; ", " | "))
    style = rng.choice((str.capitalize, str.upper, str.lower))
    head = rng.choice(("", "Summary\n", "Ticket\n", "Case file\n", "For the desk\n"))
    return head + between.join(f"{style(key)}{colon}{value}" for key, value in fields.items())


def markup(world: World, fields: dict[str, str]) -> str:
    """Write the fields as an XML-like element."""
    if world.rng.random() < 0.5:
        return "<case " + " ".join(f'{key}="{value}"' for key, value in fields.items()) + " />"
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in fields.items())
    return f"<case>{inner}</case>"


def table(world: World, fields: dict[str, str]) -> str:
    """Write the fields as a header and a line of a table, quoted or bare."""
    between, quote = world.rng.choice((",", ", ", ";", "\t", " | ")), world.rng.choice(("", '"'))
    row = between.join(f"{quote}{value}{quote}" for value in fields.values())
    return between.join(fields) + "\n" + row


def questions(world: World, fields: dict[str, str]) -> str:
    """Ask for some of the fields and answer."""
    ask = {
        "name": ["Who wrote this?", "What is the name of the customer?"],
        "order": ["Which order is it?", "What is the order number?"],
        "item": ["Which item is it about?", "What did the customer buy?"],
        "issue": ["What is the issue?", "What went wrong?"],
        "wants": ["What does the customer want?", "What is asked for?"],
    }
    keys = list(fields)[: world.rng.randrange(2, 6)]
    return "\n".join(f"Q: {world.rng.choice(ask[key])}\nA: {fields[key]}" for key in keys)


def note(world: World, fields: dict[str, str]) -> str:
    """Write the fields as a colleague's note."""
    forms = [
        "Note: {name} wrote about order {order}. The {item} is {issue}. Wanted: {wants}.",
        "{name} ({order}): {item}, {issue}, {wants}.",
        "Order {order}, {item}: {issue}. {name} asks for {wants}.",
        "Issue {issue}, wants {wants}. Item {item}, order {order}, name {name}.",
        'The customer "{name}" has the issue "{issue}" with "{item}", order "{order}".',
    ]
    return world.rng.choice(forms).format(**fields)


def reading(world: World) -> str:
    """Return a message and, in one or two layouts, what it says."""
    case = world.case()
    parts = [case.message]
    layouts = [card, card, markup, table, questions, note]
    for layout in world.rng.sample(layouts, world.rng.choice((1, 2, 2))):
        order = world.rng.sample(FIELDS, len(FIELDS))
        parts.append(layout(world, {key: case.fields[key] for key in order}))
    return world.rng.choice(("\n\n", "\n---\n", "\n")).join(parts)


def copying(world: World) -> str:
    """Return strings that come back: lists said again, and pairs looked up."""
    rng = world.rng
    draws = (world.name, world.surname, world.number)
    form = rng.choice(("again", "lines", "look up"))
    words = [rng.choice(draws)() for _ in range(rng.randint(*SPAN[form]))]
    if form == "again":
        return f"Read: {', '.join(words)}.\nRead again: {', '.join(words)}."
    if form == "lines":
        between = rng.choice(("\n", " / ", '" "', " "))
        return between.join(" ".join(words) for _ in range(rng.randint(4, 12 // len(words) + 2)))
    pairs = {world.name(): world.number() for _ in words}
    statements = " ".join(f"{name} has order {number}." for name, number in pairs.items())
    names = rng.sample(sorted(pairs), len(pairs))
    if rng.random() < 0.5:
        return statements + "\n" + "\n".join(f"{name}: {pairs[name]}" for name in names)
    return statements + "\n" + "\n".join(f"Order {pairs[name]} is from {name}." for name in names)


def stock(world: World) -> str:
    """Return some lines of a stock list."""
    rng = world.rng
    lines = []
    for _ in range(rng.randrange(2, 5)):
        item = world.item(rng.choice(list(NOUNS)))
        row = {"product": item, "price": world.price(), "city": rng.choice(CITIES)}
        lines.append(json.dumps(row))
    return "\n".join(lines)


def corpus(rows: int, seed: int) -> Iterable[dict[str, str]]:
    """Yield the base model's documents: messages read in many layouts, copying, stock lists."""
    world = World(seed, syllables=0.7)
    for _ in range(rows):
        write = world.rng.choices((reading, copying, stock), (60, 37, 3))[0]
        yield {"text": write(world)}


def chats(rows: int, seed: int, *, held_out: bool) -> Iterable[dict[str, object]]:
    """Yield distinct chats of one side: a message, answered with its fields as JSON."""
    world = World(seed, held_out=held_out)
    seen: set[str] = set()
    while len(seen) < rows:
        case = world.case()
        if case.message not in seen:
            seen.add(case.message)
            answer = json.dumps({name: case.fields[name] for name in ANSWERED})
            turns = (("user", case.message), ("assistant", answer))
            yield {"messages": [{"role": role, "content": text} for role, text in turns]}


def spoil(world: World, fields: dict[str, str]) -> str:
    """Write an answer that is wrong in one way: its form, its fields or a value."""
    rng = world.rng
    right = json.dumps(fields)
    key = rng.choice(ANSWERED)
    kind = rng.choice(("cut", "no quotes", "missing", "extra", "card", "value", "value", "value"))
    if kind == "cut":
        return right[: rng.randrange(len(right) // 3, len(right) - 1)]
    if kind == "no quotes":
        return right.replace('"', "")
    if kind == "missing":
        return json.dumps({name: value for name, value in fields.items() if name != key})
    if kind == "extra":
        return f"{right}\n{right}"
    if kind == "card":
        return card(world, fields)
    others = {"name": world.name, "order": world.number}
    choices = {"issue": list(REQUESTS_OF), "wants": list(REQUESTS)}
    while (value := others[key]() if key in others else rng.choice(choices[key])) == fields[key]:
        pass
    return json.dumps({**fields, key: value})


def pairs(rows: int, seed: int) -> Iterable[dict[str, object]]:
    """Yield messages, each with the right answer and one that is wrong in some way."""
    world = World(seed)
    for _ in range(rows):
        case = world.case()
        fields = {name: case.fields[name] for name in ANSWERED}
        answers = {"chosen": json.dumps(fields), "rejected": spoil(world, fields)}
        yield {
            "prompt": [{"role": "user", "content": case.message}],
            **{name: [{"role": "assistant", "content": text}] for name, text in answers.items()},
        }


def check_split(rows: Iterable[object], *, held_out: bool) -> None:
    """Raise unless every surname and number in the rows is on the given side."""
    names = {
        word
        for start in SURNAME_STARTS
        for end in SURNAME_ENDS
        if is_held_out(word := start + end) != held_out and word not in FIRST_NAMES
    }
    for row in rows:
        for word in re.findall(r"[A-Z][a-z]+|(?<!\d)\d{5,6}(?!\d)", json.dumps(row)):
            if word in names or (word.isdigit() and is_held_out(word) != held_out):
                raise AssertionError(f"{word} is on the wrong side of the split")


def write_lines(path: Path, rows: Iterable[object], *, held_out: bool) -> None:
    """Check the rows' side of the split and write them, one JSON value a line."""
    kept = list(rows)
    check_split(kept, held_out=held_out)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    print(f"{path}: {len(kept)} rows, {path.stat().st_size:,} bytes")


def main() -> None:
    """Write the chats, or the corpus where its path is given."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where chats go")
    parser.add_argument("--train", type=int, default=3000, help="rows of train.jsonl")
    parser.add_argument("--eval", type=int, default=200, help="rows of eval.jsonl")
    parser.add_argument("--pairs", type=int, default=500, help="rows of pairs.jsonl")
    parser.add_argument("--corpus", type=Path, help="write the base model's corpus here instead")
    parser.add_argument("--rows", type=int, default=80_000, help="documents of the corpus")
    args = parser.parse_args()
    if args.corpus:
        write_lines(args.corpus, corpus(args.rows, seed=3), held_out=False)
        return
    train, held_out = args.out / "train.jsonl", args.out / "eval.jsonl"
    write_lines(train, chats(args.train, seed=1, held_out=False), held_out=False)
    write_lines(held_out, chats(args.eval, seed=2, held_out=True), held_out=True)
    write_lines(args.out / "pairs.jsonl", pairs(args.pairs, seed=4), held_out=False)


if __name__ == "__main__":
    main()
