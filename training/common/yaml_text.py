"""YAML as plain values, bounded in time and memory, with faults in plain words.

Scalars follow YAML 1.2: 1e-4 is a number; 1:30 and 2026-01-31 are text. Tags of other types are
refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from .yaml_faults import YamlFault, fault_at, fault_of

Key = tuple[str | int, ...]

_DEEPEST = 64
"""Maximum number of lists and mappings inside each other."""
_MOST = 50_000
"""Maximum number of values, where each use of an alias counts."""
_LARGEST = 4 * 2**20
"""Maximum number of characters in a document."""
_LONGEST_NUMBER = 100
"""Maximum number of characters of a number."""

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+|0o[0-7]+)$")
_FLOAT = re.compile(
    r"(?:[-+]?(?:(?:\.[0-9][0-9_]*|[0-9][0-9_]*\.[0-9_]*)(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN))$"
)
_BOOL = re.compile(
    r"(?:yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF)$"
)
_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_MERGE = re.compile(r"<<$")
_NUMBERS = (("int", _INT, "-+0123456789"), ("float", _FLOAT, "-+.0123456789"))
_OTHERS = (("bool", _BOOL, "yYnNtTfFoO"), ("merge", _MERGE, "<"))
_CONTROL = yaml.reader.Reader.NON_PRINTABLE


class Loader(yaml.SafeLoader):
    """Composes the nodes of one document, and refuses one that is deeper or larger than the
    limits, or contains itself."""

    yaml_implicit_resolvers = {}

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open = 0
        self._extents: dict[int, tuple[int, int]] = {}
        """(number of values, depth) of each complete node, by its id."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node; see `yaml.composer.Composer`."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        if self._open == _DEEPEST:
            raise YamlFault(line, _TOO_DEEP)
        self._open += 1
        node = super().compose_node(parent, index)
        self._open -= 1
        assert node is not None
        if not isinstance(event, yaml.AliasEvent):
            self._extents[id(node)] = self._extent(node)
        elif id(node) not in self._extents:
            raise YamlFault(
                line, f"the alias *{event.anchor} stands inside its own anchor; write the values"
            )
        values, depth = self._extents[id(node)]
        if values > _MOST:
            raise YamlFault(line, f"more than {_MOST:,} values; aliases count with all they repeat")
        if depth + self._open > _DEEPEST:
            raise YamlFault(line, _TOO_DEEP)
        return node

    def _extent(self, node: yaml.Node) -> tuple[int, int]:
        extents = [self._extents[id(child)] for child in _children(node)]
        values = 1 + sum(values for values, _ in extents)
        return values, 1 + max((depth for _, depth in extents), default=0)


_TOO_DEEP = f"more than {_DEEPEST} lists and mappings inside each other; a bracket may be missing"


class Dumper(yaml.SafeDumper):
    """Writes plain values so that `Loader` reads the same values back."""


for _kind, _pattern, _starts in (*_NUMBERS, *_OTHERS):
    Loader.add_implicit_resolver(_TAG + _kind, _pattern, list(_starts))
Loader.add_implicit_resolver(f"{_TAG}null", _NULL, ["~", "n", "N", ""])
for _kind, _pattern, _starts in _NUMBERS:
    Dumper.add_implicit_resolver(_TAG + _kind, _pattern, list(_starts))


@dataclass(frozen=True)
class Parsed:
    """The values of a YAML document, and the line of each key."""

    values: Any
    lines: dict[Key, int]
    """From 1; () is the line at which the values begin."""


def parse_yaml(text: str, accepts_equal: bool = False) -> Parsed:
    """The values of a YAML document; those of an alias are copies.

    Args:
        text: the document.
        accepts_equal: a key may be repeated with the same value.

    Raises:
        YamlFault: the document is not valid YAML, holds other than plain values, repeats a key, or
            is too large or too deep.
    """
    if len(text) > _LARGEST:
        raise YamlFault(1, f"more than {_LARGEST / 2**20:g} MiB; put large parts into other files")
    _check_characters(text)
    loader = Loader(text)
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise fault_of(error, text) from None
    except YamlFault as fault:
        raise fault_at(fault.line, fault.problem, text) from None
    except (ValueError, OverflowError):  # PyYAML's own conversions of escapes and versions
        problem = "not valid YAML: an escape or a version that does not exist; correct it"
        raise fault_at(loader.get_mark().line + 1, problem, text) from None
    if root is None:
        return Parsed(None, {(): 1})
    builder = _Builder({(): root.start_mark.line + 1}, accepts_equal)
    return Parsed(builder.value(root, ()), builder.lines)


def load_yaml(text: str | bytes) -> Any:
    """The values of a YAML document; see `parse_yaml`.

    Raises:
        YamlFault, UnicodeDecodeError: the document is not valid, or not UTF-8.
    """
    return parse_yaml(text if isinstance(text, str) else text.decode("utf-8-sig")).values


def parse_setting(text: str) -> Any:
    """The value of `key=text` on a command line.

    Text in quotes or brackets is YAML. All other text is a number, true, false, null or itself:
    '#', '%', ': ' and so on have no meaning in it.

    Raises:
        YamlFault: the text is not valid YAML, or has control characters.
    """
    plain = text.strip()
    if plain[:1] in ("[", "{", '"', "'"):
        return parse_yaml(text).values
    _check_characters(plain)
    tag = Loader("").resolve(  # type: ignore[no-untyped-call]
        yaml.ScalarNode, plain, (True, False)
    )
    mark = yaml.Mark("", 0, 0, 0, None, 0)
    return _scalar(yaml.ScalarNode(tag, plain, mark), ())


def dump_yaml(values: Any, allow_unicode: bool = False) -> str:
    """The YAML document of plain values; keys keep their order.

    Args:
        allow_unicode: write non-ASCII characters as they are, for people to read. YAML reads
            some line separators back as a line feed, so escape text that must be exact.
    """
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=allow_unicode)


def _check_characters(text: str) -> None:
    match = _CONTROL.search(text)
    if match is not None:
        line = text.count("\n", 0, match.start()) + 1
        raise fault_at(line, f"the character U+{ord(match[0]):04X} is not allowed; remove it", text)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


class _Builder:
    """Turns nodes into values, and notes the line of each key."""

    def __init__(self, lines: dict[Key, int], accepts_equal: bool) -> None:
        self.lines = lines
        self.accepts_equal = accepts_equal

    def value(self, node: yaml.Node, key: Key) -> Any:
        """The value of a node."""
        if isinstance(node, yaml.MappingNode):
            _check_tag(node, "map", key)
            return self._mapping(node, key)
        if isinstance(node, yaml.SequenceNode):
            _check_tag(node, "seq", key)
            values = []
            for index, item in enumerate(node.value):
                self.lines[(*key, index)] = item.start_mark.line + 1
                values.append(self.value(item, (*key, index)))
            return values
        assert isinstance(node, yaml.ScalarNode)
        return _scalar(node, key)

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        """The mapping's own values, over those that it merges (<<)."""
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if name_node.tag == f"{_TAG}merge":
                values.update(self._merged(value_node, key))
        seen: dict[str, int] = {}
        for name_node, value_node in node.value:
            if name_node.tag == f"{_TAG}merge":
                continue
            name, line = _name(name_node, key), name_node.start_mark.line + 1
            inner = (*key, name)
            value = self.value(value_node, inner)
            if name in seen and not (self.accepts_equal and values[name] == value):
                raise YamlFault(line, f"already set on line {seen[name]}; keep one of them", inner)
            seen[name] = self.lines[inner] = line
            values[name] = value
        return values

    def _merged(self, node: yaml.Node, key: Key) -> dict[str, Any]:
        """The values of a mapping or of several, of which the first has precedence."""
        values: dict[str, Any] = {}
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for each in reversed(nodes):
            if not isinstance(each, yaml.MappingNode):
                line = each.start_mark.line + 1
                raise YamlFault(line, "<< takes a mapping or an alias of one, as in <<: *name", key)
            values.update(self._mapping(each, key))
        return values


def _name(node: yaml.Node, key: Key) -> str:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.ScalarNode):
        raise YamlFault(
            line, "a key must be text; put a text that starts with { or [ into quotes", key
        )
    if node.tag != f"{_TAG}str":
        raise YamlFault(
            line, f"the key must be text; put it into quotes: '{node.value}'", (*key, node.value)
        )
    return str(node.value)


def _scalar(node: yaml.ScalarNode, key: Key) -> Any:
    kind, text = node.tag.removeprefix(_TAG), str(node.value)
    if kind in ("str", "merge"):
        return text
    if kind == "null":
        return None
    if kind == "bool" and _BOOL.match(text):
        return text.lower() in ("yes", "true", "on")
    line = node.start_mark.line + 1
    if kind in ("int", "float") and len(text) > _LONGEST_NUMBER:
        raise YamlFault(line, f"a number of {len(text):,} characters; write a shorter one", key)
    if kind == "int" and _INT.match(text):
        return int(text.replace("_", ""), 0)
    if kind == "float" and _FLOAT.match(text):
        return float(re.sub(r"^([-+]?)\.(?=[inIN])", r"\1", text.replace("_", "")))
    _check_tag(node, "", key)
    return None


def _check_tag(node: yaml.Node, kind: str, key: Key) -> None:
    if node.tag != _TAG + kind:
        tag = node.tag.replace(_TAG, "!!")
        raise YamlFault(
            node.start_mark.line + 1,
            f"the tag {tag} is not possible here; remove it, or put a text that starts with ! "
            "into quotes",
            key,
        )
