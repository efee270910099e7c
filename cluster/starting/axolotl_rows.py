"""Axolotl's data sets as sources: prompt strategies, field maps, roles."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...training.config.methods import ONLINE
from .axolotl_strategies import TEXTS, strategy_of, why_none
from .draft import Draft, ForeignSettings
from .places import Places, files_of

_PAIRS: dict[str, dict[str, str]] = {
    "intel": {"instruction": "question"},
    "icr": {"instruction": "input"},
    "prompt_pairs": {"instruction": "prompt"},
    "argilla": {"chosen": "chosen_response", "rejected": "rejected_response"},
    "argilla_chat": {},
    "ultra": {},
    "default": {},
    "load": {},
}
"""Columns by the loader of a strategy for pairs."""
_LABELLED: dict[str, dict[str, str]] = {
    "intel": {"instruction": "question", "output": "completion"},
    "prompt_pairs": {"instruction": "prompt", "output": "completion"},
    "argilla": {"output": "completion"},
    "argilla_chat": {"messages": "completion"},
    "ultra": {"instruction": "prompt", "output": "completion"},
    "default": {},
}
_CONVERSATIONS = ("default", "load", "argilla", "prompt_pairs", "load_prompt_pairs")
"""Loaders of ORPO's strategies, all of conversations."""
_OF_PAIRS = ("chat_template", "chatml", "llama3", "passthrough")
"""Axolotl's own strategies for pairs; others are the user's."""
_FIELDS = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_system": "system",
    "field_tools": "tools",
    "field_messages": "messages",
    "field_prompt": "instruction",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "output",
    "field_label": "label",
    "field": "text",
    "text_column": "text",
}
"""finray's columns by Axolotl's keys."""
_ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = ("reasoning_content", "tool_calls")
"""Keys of a message beside role and content that a source may name."""
_OF_TURNS = (
    ("field_thinking", "reasoning_content", ("reasoning_content", "reasoning", "thinking")),
    ("message_field_training", "weight", ("weight", "train", "loss", "loss_weight")),
)
"""Axolotl's key, the one of a source's message_keys, and what finray reads by itself."""
_LEFT = {
    "ds_type": "the kind of the files, which finray reads from their names",
    "preprocess_shards": "how rows are prepared",
    "trust_remote_code": "loading scripts, which finray never runs",
    "train_on_eos": "which ends of turns are trained; finray trains the end of each trained turn",
    "template_thinking_key": "the template's key for reasoning",
    "split_thinking": "finray splits <think> by itself",
    "message_field_training_detail": "parts of a turn that do not count, which finray trains whole",
    "input_format": "how a strategy joins its fields; the chat template does it",
    "input_transform": "your own function; write it as map of the source",
    "logprobs_field": "distillation, which finray does not have",
    "temperature": "distillation, which finray does not have",
    "train_on_eot": "which ends of turns are trained; finray trains the end of each trained turn",
    "field_human": "a strategy that Axolotl no longer has",
    "field_model": "a strategy that Axolotl no longer has",
    "drop_system_message": "leaving out system messages; map of the source can do it",
    "drop_exact_duplicates": "data.curate: [deduplicate]",
    "skip": "rows at the beginning; split: train[N:] leaves them out",
    "eos_token": "an answer ends as the chat template writes it",
    "max_completion_length": "the length of a step",
    "step_separator": "single steps, from which no method learns",
    "train_on_last_step_only": "single steps, from which no method learns",
}
_FORMATS = (
    *("no_input_format", "format", "prompt_format", "chosen_format", "rejected_format"),
    "completion_format",
)


@dataclass
class Rows:
    """What the data sets of a configuration say together."""

    sources: list[dict[str, Any]] = field(default_factory=list)
    systems: list[str] = field(default_factory=list)
    """The system prompts that their strategies write, source by source."""
    templates: set[str] = field(default_factory=set)
    """Names of chat templates, or Jinja texts."""
    strategies: set[str] = field(default_factory=set)
    """Names of prompt strategies."""
    styles: set[str] = field(default_factory=set)
    """The texts that strategies write around the fields; empty for those that write none."""
    trains: str = ""
    """method.train_on, where it is not the assistant's turns alone."""
    formats: list[str] = field(default_factory=list)
    """Formats of prompts, of strategies that the user defines."""
    system_format: str = "{system}"
    """The format of a system prompt, of these."""

    @property
    def are_texts(self) -> bool:
        """True if all rows are plain text."""
        return bool(self.strategies) and self.strategies <= set(TEXTS)


def read_rows(draft: Draft, key: str, method: str, places: Places) -> Rows:
    """The sources of `datasets`, `test_datasets` or `pretraining_dataset`."""
    value = draft.settings.value(key)
    entries = value if isinstance(value, list) else [value] if value is not None else []
    rows = Rows()
    for index, entry in enumerate(entries):
        written = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(written, dict):
            raise draft.refusal(key, "expected a list of data sets with a path; correct it")
        _Entry(draft, f"{key}.{index}", written, method, rows).read(places)
    return rows


class _Entry:
    def __init__(
        self, draft: Draft, key: str, values: Mapping[str, Any], method: str, rows: Rows
    ) -> None:
        self.draft, self.key, self.method, self.rows = draft, key, method, rows
        self.settings = ForeignSettings(values, f"{draft.settings.where}: {key}")
        self.values = dict(values)
        if isinstance(parts := values.get("split"), list):  # as datasets' own notation adds them
            self.values["split"] = "+".join(map(str, parts))
        self.source: dict[str, Any] = {}
        self.columns: dict[str, str] = {}
        self.system = ""

    def read(self, places: Places) -> None:
        """Add the entry's sources."""
        self._strategy()
        self._fields()
        self._messages()
        split = self.values.get("split")
        self._part()
        self._templates()
        if self.columns:
            self.source["columns"] = self.columns
        name = self._take("path") or ""
        files = files_of(self.settings, split)
        self.values.pop("data_files", None)
        for place in places.source(str(name), files):
            self.rows.systems.append(self.system)
            self.rows.sources.append({**place, **self.source})
        for key, value in self.values.items():
            if value not in (None, "", [], {}, False):
                name = f"{self.key}.{key}"
                if key in _LEFT:
                    self.draft.leave(name, _LEFT[key])
                else:
                    self.draft.strangers.append(name)

    def _take(self, name: str) -> Any:
        value = self.values.pop(name, None)
        return None if value in (None, "", [], {}) else value

    def _strategy(self) -> None:
        """Columns by the prompt strategy."""
        kind = self._take("type")
        if isinstance(kind, dict):
            self.rows.strategies.add("user_defined")
            self.values |= kind
            if prompt := self._take("system_prompt"):
                self.source["system"] = str(prompt)
            if (text := self._take("system_format")) is not None:
                self.rows.system_format = str(text)
            self.rows.styles.add("own" if self.method == "sft" else "")
            formats = [self._take(name) for name in _FORMATS]
            named = [str(text) for text in formats if text is not None]
            self.rows.formats += named or (["{instruction} "] if self.method == "sft" else [])
            return
        if kind is None:
            if self.method == "sft":
                self.draft.notes.append(
                    f"{self.key}: without a type Axolotl reads tokens (input_ids); finray reads "
                    "texts and conversations"
                )
            return
        name, _, style = str(kind).partition(":")
        stem, _, loader = name.partition(".")
        if self.method in ONLINE:
            self.draft.leave(
                f"{self.key}.type", f"{kind}: your own function; write it as map of the source"
            )
            return
        if self.method == "sft":
            columns = self._imitated(name, stem, style)
        else:
            columns = self._of_pairs(stem, loader)
            self.rows.strategies.add("pairs")
            if stem in ("chatml", "llama3"):
                self.rows.templates.add(stem)
        if columns is None:
            self.draft.leave(f"{self.key}.type", why_none(str(kind)))
            return
        self.columns |= columns
        if self.method == "sft" and stem == "alpaca":
            self.source["format"] = "alpaca"

    def _imitated(self, name: str, stem: str, style: str) -> Mapping[str, str] | None:
        """Columns of a strategy for imitation; None for an unknown one."""
        self.rows.strategies.add(stem)
        strategy = strategy_of(name)
        if strategy is None:
            self.rows.styles.add("")
            return None
        self.rows.styles.add(style if style and strategy.style else strategy.style)
        self.system = strategy.system
        if stem in ("pygmalion", "llama2_chat"):
            self.rows.templates.add(stem)
        return strategy.columns

    def _of_pairs(self, stem: str, loader: str) -> dict[str, str] | None:
        """Columns of pairs, or of labelled answers, by the strategy; None for an unknown one."""
        if stem == "bradley_terry":
            is_own = loader.partition(".")[0] in ("", *_OF_PAIRS)
            return {"instruction": "input"} if is_own else None
        if stem not in _OF_PAIRS:
            return None
        if self.method == "orpo":
            return {} if (loader or "default") in _CONVERSATIONS else None
        table = _LABELLED if self.method == "kto" else _PAIRS
        return table.get(loader or "default")

    def _fields(self) -> None:
        """Columns that the entry itself names."""
        for name, column in _FIELDS.items():
            value = self._take(name)
            if value is None or not isinstance(value, str):
                continue
            is_sharegpt = value == "conversations" or "sharegpt" in self.rows.strategies
            own = "conversations" if column == "messages" and is_sharegpt else column
            if value == own:
                self.columns.pop(own, None)
            else:
                self.columns[own] = value

    def _messages(self) -> None:
        """Keys and roles of messages."""
        keys = {
            "role": self._take("message_field_role"),
            "content": self._take("message_field_content"),
        }
        mapped = self._take("message_property_mappings")
        if isinstance(mapped, dict):
            keys |= {name: mapped[name] for name in ("role", "content") if mapped.get(name)}
            others = {n: str(v) for n, v in mapped.items() if n not in keys and n != v}
            keys |= {name: others.pop(name) for name in _MESSAGE_KEYS if name in others}
            if others:
                self.draft.leave(
                    f"{self.key}.message_property_mappings",
                    f"{', '.join(others)}: keys of a message that map of the source can rename",
                )
        keys |= self._of_turns()
        named = {name: str(value) for name, value in keys.items() if value and value != name}
        if named and set(named.values()) != {"from", "value"}:
            self.source["message_keys"] = named
        roles = self._take("roles")
        if isinstance(roles, dict):
            written = {
                str(theirs): own
                for own, names in roles.items()
                for theirs in (names if isinstance(names, list) else [names])
                if own in _ROLES and theirs != own
            }
            if written:
                self.source["roles"] = written

        self._trained()

    def _of_turns(self) -> dict[str, str]:
        """The keys of a turn's reasoning, and of whether it counts, where finray reads others."""
        keys = {}
        for name, own, usual in _OF_TURNS:
            value = self._take(name)
            if value is not None and str(value) in usual:
                self.draft.mapped[f"{self.key}.{name}"] = f"finray reads {value}"
            elif value is not None:
                keys[own] = str(value)
        return keys

    def _trained(self) -> None:
        """The roles that are trained; none at all is Axolotl's old way to train the last turn."""
        names = ("roles_to_train", "train_on_eos")
        is_last = all(name in self.values and not self.values[name] for name in names)
        trained = self._take("roles_to_train")
        if isinstance(trained, list) and {"user", "human", "system"} & set(map(str, trained)):
            self.rows.trains = "all"
        elif is_last and "weight" not in self.source.get("message_keys", {}):
            self.rows.trains = self.rows.trains or "last"

    def _part(self) -> None:
        """The part of the data set that is used."""
        weight = self.settings.number("weight")
        self.values.pop("weight", None)
        if weight is not None and 0 < weight < 1:
            self.source["weight"] = weight
        for name, own in (("name", "subset"), ("revision", "revision")):
            if (value := self._take(name)) is not None:
                self.source[own] = str(value)
        split = self._take("split")
        shards = self.settings.whole("shards", 1)
        index = self.settings.whole("shards_idx", 0) or 0
        for name in ("shards", "shards_idx"):
            self.values.pop(name, None)
        if shards:
            share = max(1, round(100 / shards))
            start = min(index * share, 99)
            split = f"{split or 'train'}[{start}%:{min(start + share, 100)}%]"
            self.draft.change(f"{self.key}.shards", f"a part of the rows: split {split}")
        if split is not None and split != "train":
            self.source["split"] = str(split)

    def _templates(self) -> None:
        for name in ("chat_template", "conversation", "chat_template_jinja"):
            value = self._take(name)
            if value is not None and value != "jinja":
                self.rows.templates.add(str(value))
