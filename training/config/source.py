"""A source of rows: files, a folder or a data set of the hub, and what is done with its rows."""

import ast
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ..common.errors import InputError
from .section import PositiveInt, Section
from .short_forms import as_function
from .user_code import UserFunction

KnownFormat = Literal[
    "preference",
    "labelled",
    "messages",
    "alpaca",
    "sharegpt",
    "prompt_completion",
    "prompt",
    "text",
]
RowFormat = Literal["auto", KnownFormat]

Role = Literal["system", "user", "assistant", "tool", "function_call"]

MessageKey = Literal["role", "content", "reasoning_content", "tool_calls", "weight"]


class RowFunction(UserFunction):
    """The user's function from a row to a row."""

    file: str
    """A Python file and a function in it, "rows.py:to_messages", relative to the recipe's folder.
    It takes a row as a dict and returns one, or None to leave the row out."""
    source: str | None = None
    """The file's text, which travels with the recipe; leave it out, and the file is read."""

    def check_parameters(self, function: ast.FunctionDef, place: str) -> None:
        """The row is the only argument."""
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        required = len(positional) - len(arguments.defaults)
        if required > 1 or not (positional or arguments.vararg) or None in arguments.kw_defaults:
            raise InputError(f"{place} must take one argument, the row; correct its parameters")


class Source(Section):
    """Rows, and how they are read: of `path`, or of `dataset`."""

    path: str | None = None
    """File, glob or folder (relative to the recipe's folder), or a URI: s3://, gs://, hf://."""
    dataset: str | None = None
    """Instead of a path: a data set of the hub (owner/name), a folder that `save_to_disk` of the
    datasets library wrote, or with `dataset_info` a name in that file."""
    dataset_info: str | None = None
    """LLaMA-Factory's dataset_info.json (relative to the recipe's folder), which says where a data
    set of this name is and what its columns are called."""
    subset: str | None = None
    """The configuration of a data set that has several."""
    split: str | None = None
    """A split of a data set or folder, or a part of one, in the notation of the datasets library:
    test, train[:5%], train[1000:2000], train+validation. Absent: train."""
    revision: str | None = None
    """Commit, tag or branch of a data set of the hub."""
    format: RowFormat = "auto"
    """Shape of the rows; auto looks at the first ones."""
    weight: Annotated[float, Field(gt=0.0, le=1e6)] = 1.0
    """How often each row is used: 2 uses each row twice, 0.5 every second row (by its hash)."""
    limit: PositiveInt | None = None
    """Use the first rows only, as many as this."""
    map: Annotated[RowFunction | None, BeforeValidator(as_function, str | RowFunction | None)] = (
        None
    )
    """A Python function, "rows.py:to_messages", that each row goes through first."""
    columns: dict[str, str] = {}
    """Columns under other names, as in {prompt: question, completion: answer}: on the left the
    name that the shape of the rows expects, on the right the source's own."""
    message_keys: dict[MessageKey, str] = {}
    """The keys of a message under other names, as in {role: speaker, content: utterance}. weight
    says whether a turn is trained: 0 or 1, false or true."""
    roles: dict[str, Role] = {}
    """The roles that other role names stand for, as in {customer: user, agent: assistant}."""
    system: str | None = None
    """System prompt of each conversation that begins without one."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.path is not None and self.dataset is not None:
            raise ValueError("path and dataset contradict each other; keep one of them")
        if self.path is None and self.dataset is None and self.split is None:
            raise ValueError(
                "needs a path or a dataset (in data.eval a split of the training data is enough)"
            )
        for name, given in (("revision", self.revision), ("dataset_info", self.dataset_info)):
            if given is not None and self.dataset is None:
                raise ValueError(f"{name} belongs to a dataset; add that, or remove {name}")
        if self.dataset_info is not None and self.split is not None:
            raise ValueError("dataset_info names the split itself; remove split")
        return self

    @property
    def place(self) -> str:
        """The path or data set."""
        return self.path or self.dataset or ""

    @property
    def label(self) -> str:
        """The source in messages and reports: its path or data set, with what of it is read."""
        revision = f"@{self.revision}" if self.revision else ""
        parts = [part for part in (self.subset, self.split) if part]
        limit = [f"the first {self.limit:,} rows"] if self.limit else []
        chosen = ", ".join([*parts, *limit])
        return f"{self.place}{revision}" + (f" ({chosen})" if chosen else "")
