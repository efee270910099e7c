"""What is wrong in a document: recipes, commands, programs, paths and links that do not hold."""

import copy
import io
import json
import re
import tempfile
from argparse import ArgumentParser, Namespace, _SubParsersAction
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from finray.cluster.cli.arguments import build_parser
from finray.cluster.cli.usage import parse
from finray.training.common.errors import InputError
from finray.training.config.recipe import Recipe
from finray.training.config.section import Section, json_schema
from finray.training.config.validation import validate
from finray.training.config.yaml_file import (
    Document as Settings,
)
from finray.training.config.yaml_file import (
    apply_changes,
    read_recipe_file,
)
from finray.tuning.combinations import Combinations
from finray.tuning.space import Space
from finray.tuning.sweep import Sweep, split_overrides

from .documents import ROOT, Document, Fence, read

Files = Mapping[str, dict[str, Any]]
"""Settings of the recipes and sweeps that documents introduce as `# name.yaml`, by that name."""

_REST: dict[str, Any] = {
    "name": "example",
    "model": {"base": "owner/model"},
    "data": {"train": [{"path": "rows.jsonl"}], "holdout": 0.1},
}
"""What a part of a recipe lacks to be a whole one."""
_SWEEP_REST = {"name": "example", "recipe": {**_REST, "adapter": {"rank": 16}}}
_KUSTOMIZATION = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
_FOLDERS = "training|tuning|cluster|k8s|tests|benchmarks|docs|recipes"
_PATH = re.compile(rf"(?:{_FOLDERS})/[\w./-]*")
_SHELL_NAME = re.compile(r"(?:\S*/)?finray")


def files_in(documents: Sequence[Document]) -> dict[str, dict[str, Any]]:
    """The settings of every block that begins with a file's name."""
    return {
        fence.file_name: _settings(fence).values
        for document in documents
        for fence in document.fences
        if fence.language == "yaml" and fence.file_name is not None
    }


def faults(document: Document, files: Files) -> list[str]:
    """A line for each thing in the document that does not hold."""
    checks = (_bad_blocks, _bad_commands, _bad_code, _bad_links)
    name = document.path.relative_to(ROOT)
    return [f"{name}:{line}: {text}" for check in checks for line, text in check(document, files)]


Faults = Iterator[tuple[int, str]]


def _bad_blocks(document: Document, _: Files) -> Faults:
    for fence in document.fences:
        try:
            if fence.language == "yaml":
                _check_yaml(fence)
            elif fence.language == "python":
                compile(fence.text, "block", "exec")
            elif fence.language in ("json", "jsonl"):
                for text in fence.text.splitlines() if fence.language == "jsonl" else [fence.text]:
                    json.loads(text)
        except (InputError, SyntaxError, ValueError) as error:
            yield fence.line, str(error)


def _check_yaml(fence: Fence) -> None:
    settings = _settings(fence)
    if fence.title == "kustomization.yaml":
        if unknown := settings.values.keys() - _KUSTOMIZATION:
            raise InputError(f"unknown keys of a kustomization: {unknown}")
    elif is_sweep(settings.values):
        _check_sweep(settings)
    else:
        _check(Recipe, _completed(settings, _REST))


def is_sweep(values: Mapping[str, Any]) -> bool:
    """True for a sweep, or a part of one whose keys are not those of a recipe."""
    keys = set(values)
    is_part = keys <= Sweep.model_fields.keys() and not keys <= Recipe.model_fields.keys()
    return "recipe" in keys or is_part


def _settings(fence: Fence) -> Settings:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "block"
        file.write_text(fence.text, encoding="utf-8")
        settings = read_recipe_file(file)
    return Settings(settings.values, {(): "the block"})


def _check(settings: type[Section], document: Settings) -> Any:
    """Validate as finray does, and by the schema that editors use."""
    checked = validate(settings, document)
    for error in _validator(settings).iter_errors(document.values):
        raise InputError(f"{error.json_path}: not valid by the JSON schema: {error.message}")
    return checked


@cache
def _validator(settings: type[Section]) -> Draft202012Validator:
    return Draft202012Validator(json_schema(settings))


def _completed(settings: Settings, rest: Mapping[str, Any]) -> Settings:
    values = _merged(rest, settings.values)
    if "eval" in values.get("data", {}):
        values["data"].pop("holdout", None)
    return Settings(values, settings.places)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(below))
    for key, value in above.items():
        inner = merged.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[key] = _merged(inner, value) if both else copy.deepcopy(value)
    return merged


def _check_sweep(settings: Settings) -> None:
    """Beside the sweep's own keys: every key that it searches or sets is one of a recipe."""
    sweep = _check(Sweep, _completed(settings, _SWEEP_REST))
    values = sweep.recipe if isinstance(sweep.recipe, dict) else _SWEEP_REST["recipe"]
    base = Settings(copy.deepcopy(_merged({"name": "example"}, values)), {(): "recipe"})
    apply_changes(base, [f"{key}={json.dumps(value)}" for key, value in sweep.set.items()])
    if isinstance(sweep.search, dict):
        space = Space(sweep.search, validate(Recipe, base), Path(), lambda key: "the block")
        Combinations(space).excluded()


def _bad_commands(document: Document, files: Files) -> Faults:
    for fence in document.fences:
        for line, words in fence.commands():
            try:
                _check_command(words, document, files)
            except InputError as error:
                yield line, f"{' '.join(words)}: {error}"


def _check_command(words: list[str], document: Document, files: Files) -> None:
    if _SHELL_NAME.fullmatch(words[0]) and words[1:]:
        _check_finray(words[1:], document, files)
    elif words[0] == "make":
        for target in words[1:]:
            if target not in _make_targets():
                raise InputError(f"the Makefile has no target {target}")
    elif words[0].rpartition("/")[2] in ("python", "python3") and words[1:]:
        places = (ROOT / words[1], document.path.parent / words[1])
        if words[1].endswith(".py") and not any(place.exists() for place in places):
            raise InputError(f"there is no {words[1]}")


@cache
def _make_targets() -> frozenset[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^([\w-]+):", text, re.MULTILINE))


def _check_finray(words: list[str], document: Document, files: Files) -> None:
    options = _parsed(words)
    if options is None:
        return
    file = getattr(options, "recipe", None) or next(iter(getattr(options, "sweep", ())), None)
    if file is None or not str(file).endswith(".yaml"):
        return
    values = _values_of(str(file), document, files)
    overrides = list(getattr(options, "overrides", ()))
    overrides += [f"stop_when.{bound}" for bound in getattr(options, "bounds", ())]
    _check_overrides(values, overrides)


def _parsed(words: list[str]) -> Namespace | None:
    """The options of a command, by the real parser; None if it only prints help."""
    try:
        with redirect_stdout(io.StringIO()):
            return parse(words)
    except SystemExit:
        return None


def _values_of(name: str, document: Document, files: Files) -> dict[str, Any]:
    own = files_in([document])
    if name in own or name in files:
        return own.get(name) or files[name]
    for folder in (ROOT, document.path.parent):
        if (folder / name).is_file():
            return read_recipe_file(folder / name).values
    raise InputError(f"{name} is no file of the repository, nor does a document introduce it")


def _check_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    changed = Settings(copy.deepcopy(values), {(): "the command"})
    own, of_recipe = split_overrides(overrides) if is_sweep(values) else (overrides, ())
    apply_changes(changed, list(own))
    if is_sweep(values):
        _check(Sweep, _completed(changed, _SWEEP_REST))
        changed = Settings(copy.deepcopy(_SWEEP_REST["recipe"]), {(): "the command"})
        apply_changes(changed, list(of_recipe))
    _check(Recipe, _completed(changed, _REST))


def _bad_code(document: Document, _: Files) -> Faults:
    """Commands in the prose, which may leave out arguments, and paths of the repository."""
    for line, code in document.code():
        if code.startswith("finray "):
            if (fault := _unknown_word(build_parser(), code.split()[1:])) is not None:
                yield line, f"{code}: {fault}"
        elif _PATH.fullmatch(code) and not (ROOT / code).exists():
            yield line, f"there is no {code} in the repository"
        elif code.startswith("make ") and code.split()[1] not in _make_targets():
            yield line, f"the Makefile has no target {code.split()[1]}"


def _unknown_word(parser: ArgumentParser, words: list[str]) -> str | None:
    while words and not words[0].startswith("-"):
        choices = [
            action.choices for action in parser._actions if isinstance(action, _SubParsersAction)
        ]
        if not choices:
            break
        if words[0] not in choices[0]:
            return f"there is no command {words[0]}"
        parser, words = choices[0][words[0]], words[1:]
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    return next(
        (f"no option {name}" for name in options if name not in parser._option_string_actions),
        None,
    )


def _bad_links(document: Document, _: Files) -> Faults:
    for line, target in document.links():
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.path.parent / path
        if not file.exists():
            yield line, f"the link {target} leads nowhere"
        elif anchor and anchor not in (read(file) if path else document).anchors():
            yield line, f"the link {target} names no heading"
