"""A recipe from data, model and machine, with a comment that explains each choice."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...training.common.errors import InputError
from ...training.common.formatting import count, counted, percent
from ...training.common.yaml_text import load_yaml
from ...training.config.methods import METHODS
from ...training.config.model_folder import model_folder
from ...training.config.models import ModelSettings
from ...training.config.paths import resolve_model, resolve_path
from ...training.config.places import about
from ...training.config.recipe import Recipe, load_recipe
from ...training.config.weight_checks import text_part
from ...tuning.default_search import suggested_learning_rate
from ..gpus import Gpu, amount
from ..memory_fit import judge, memory_text, room_of
from .recipe_text import recipe_text
from .rows_look import RowsLook, look_at_rows, method_of, place_of_data

if TYPE_CHECKING:
    from ...training.models.memory_estimate import Sizes

_MODELS = (
    (70, "Qwen/Qwen3-8B"),
    (22, "Qwen/Qwen3-4B"),
    (10, "Qwen/Qwen3-1.7B"),
    (0, "Qwen/Qwen3-0.6B"),
)
"""(least GiB of a GPU, open model under the Apache licence) for LoRA in 16 bits."""
_LONGEST = 8192
"""Tokens; a first run needs no longer rows."""
_NO_LIMIT = 2**17
_LORA_RATE, _PREFERENCE_RATE = 2e-4, 1e-5
_SIZE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)([bm])(?![a-z])", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_AS_CHAT = "{instruction: prompt, output: completion}"
_FEW = 0.05
"""A larger share of rows that are left out is worth a note."""
_LEAST_ROWS = 100
"""Of fewer rows, a share might hold out none."""
_STEPS = 10
"""An epoch has at least about this many steps."""


@dataclass
class Choices:
    """The settings of the recipe, each with what explains it."""

    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)

    def choose(self, key: str, value: Any, why: str) -> None:
        """Set a dotted key."""
        section, _, name = key.partition(".")
        if name:
            self.values.setdefault(section, {})[name] = value
        else:
            self.values[section] = value
        self.comments[key] = why


@dataclass(frozen=True)
class FirstRecipe:
    """A recipe that `finray init` makes."""

    text: str
    model: str
    method: str
    has_model: bool
    """True if the model's small files are on this machine."""
    notes: tuple[str, ...]
    """What the user should know beside the comments."""
    values: dict[str, Any]
    """The recipe's settings, as `finray.check` and `finray.train` take them; paths are absolute."""
    fault: str | None = None
    """Why the recipe cannot be used yet: the model's chat template does not take the rows, or all
    are longer than it takes."""


def first_recipe(
    data: str,
    model: str | None,
    method: str | None,
    rewards: Sequence[str],
    gpus: Sequence[Gpu],
    target: Path,
) -> FirstRecipe:
    """Look at data, machine and model, and choose.

    Args:
        data: a file, a folder, a URI, or a data set of the hub.
        model: a folder or a hub id; None: a small open model that fits the machine.
        method: a method's kind; None: by the rows' shape.
        rewards: reward functions of an online method, as FILE:FUNCTION.
        gpus: this machine's.
        target: the recipe's folder, from which its paths start.

    Raises:
        InputError: the data cannot be read, or the method does not learn from it.
    """
    place = place_of_data(data)
    shape, likely = method_of(place)
    kind = _kind(method, likely, shape, rewards)
    base, why = (model, "as --model says") if model else _small_model(gpus, kind)
    resolved, folder, reason = _model_here(base)
    choices, notes = Choices(), []
    choices.choose("name", _name(data, kind), "")
    written = base if resolved == base else _from(target, base)
    choices.choose("model.base", written, why)
    if reason is not None:
        notes.append(
            f"{base} is not on this machine, and cannot be fetched ({reason}): its size is taken "
            "from its name, and the lengths of the rows from their characters"
        )
    method_settings = _method(choices, kind, shape, method is not None, rewards, target)
    start = {
        "name": "first",
        "model": {"base": resolved},
        "adapter": {"rank": 16},
        "method": method_settings,
        "data": {"train": [place], "max_length": _positions(folder)},
    }
    if METHODS[kind].samples_online:
        method_settings["max_completion"] = _completion(_positions(folder))
        start["optim"] = {"batch_size": 8}
    look = look_at_rows(load_recipe(start), folder)
    if look.longer > _FEW and not look.leaves_all_out:
        notes.append(
            f"{percent(look.longer)} of the first rows are longer than the model takes, and left "
            f"out; {_cutting(kind)} cuts them instead"
        )
    _data(choices, place, look, kind, folder, target)
    _adapter(choices, kind)
    _duration(choices, look, kind, max(1, len(gpus)))
    recipe = load_recipe(_provisional(choices, start))
    _rate(choices, recipe, folder)
    _memory(choices, recipe, gpus, folder, base)
    _workers(choices, gpus, kind)
    _held_out(choices, look, kind)
    head = [f"Made by finray init from {data}: {_rows(look)}."]
    values = {name: choices.values[name] for name in Recipe.model_fields if name in choices.values}
    text = recipe_text(values, choices.comments, head)
    absolute = dict(load_yaml(text))
    absolute["model"]["base"] = resolved
    absolute["data"]["train"] = [place]
    if rewards:
        files = [{"file": resolve_path(name, Path.cwd())} for name in rewards]
        absolute["method"]["rewards"] = files
    fault = _fault(look, kind, base, recipe.data.max_bad_rows)
    return FirstRecipe(text, base, kind, folder is not None, tuple(notes), absolute, fault)


def _fault(look: RowsLook, kind: str, base: str, max_bad_rows: float) -> str | None:
    """Why the rows cannot be used with the model; None if they can."""
    if look.unrendered > max_bad_rows:
        return f"{_unrendered(look, ' of the rows')} with {base}: {look.fault}"
    if look.leaves_all_out:
        return (
            f"all of the first rows are longer than {base} takes, and left out; "
            f"{_cutting(kind)} cuts them instead"
        )
    return None


def _cutting(kind: str) -> str:
    """The setting that cuts long rows; of a prompt, the end is the request itself."""
    side = "truncate_left" if METHODS[kind].samples_online else "truncate"
    return f"data.overlong: {side}"


def _kind(method: str | None, likely: str, shape: str, rewards: Sequence[str]) -> str:
    kind = method or likely
    if kind not in METHODS:
        raise InputError(f"--method: expected one of {', '.join(METHODS)}, found {kind}")
    if METHODS[kind].samples_online and not rewards:
        what = f"rows of {shape} have no answers to learn from, so the model answers itself (grpo)"
        if method is not None:
            what = f"{kind} scores the model's own answers"
        raise InputError(
            f"--reward: {what}, and that needs a reward function; write one and name it: --method "
            f"{kind} --reward rewards.py:reward"
        )
    if rewards and not METHODS[kind].samples_online:
        raise InputError(f"--reward: {kind} has no rewards; leave it out, or take --method grpo")
    return kind


def _model_here(base: str) -> tuple[str, Path | None, str | None]:
    """The model as a recipe resolves it, the folder with its small files, and why there is none.

    Raises:
        InputError: it is neither a folder nor a hub id, or the folder is no model's.
    """
    with about("--model"):
        resolved = resolve_model(base, Path.cwd())
        if not Path(resolved).is_absolute() and not _HUB_ID.fullmatch(base):
            raise InputError(f"{base} is neither a folder nor a hub id (owner/name); correct it")
        model = ModelSettings(base=resolved)
        folder = model_folder(model, only_cached=True)
        if folder is None:
            try:
                folder = model_folder(model)
            except InputError:
                return resolved, None, "the hub does not answer, or has no such model for you"
    return resolved, folder, None


def _small_model(gpus: Sequence[Gpu], kind: str) -> tuple[str, str]:
    """A small open model that fits, and why it."""
    room = room_of(gpus)
    gib = 0.0 if room is None else room.bytes / 2**30
    name = next(name for least, name in _MODELS if gib >= least)
    if kind == "pretrain":
        name = f"{name}-Base"
    where = f"LoRA fits {gpus[0]}" if room is not None else "this machine has no GPU"
    return name, f"A small open model (Apache-2.0), as --model names none; {where}."


def _name(data: str, kind: str) -> str:
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data.rstrip("/")).name.partition(".")[0])
    return f"{stem.strip('-._') or 'first'}-{kind}"[-63:].strip("-._")


def _rows(look: RowsLook) -> str:
    about_ = "" if look.is_exact else "about "
    return f"{about_}{counted(look.rows, 'row')} of {look.format}"


def _method(
    choices: Choices, kind: str, shape: str, is_chosen: bool, rewards: Sequence[str], target: Path
) -> dict[str, Any]:
    settings: dict[str, Any] = {"kind": kind}
    title = METHODS[kind].title
    why = "as --method says" if is_chosen else f"learns from rows of {shape}"
    choices.choose("method.kind", kind, f"{title}: {why}.")
    if rewards:
        settings["rewards"] = [{"file": name} for name in rewards]
        written = [{"file": _from(target, name)} for name in rewards]
        choices.choose("method.rewards", written, "What scores the model's answers.")
    return settings


def _from(target: Path, path: str) -> str:
    """A path of the current folder as a recipe in the target writes it."""
    is_free = path.startswith("~") or Path(path).is_absolute()
    return path if is_free else os.path.relpath(Path.cwd() / path, target)


def _positions(folder: Path | None) -> int:
    """Tokens that the model takes at most."""
    if folder is None:
        return _NO_LIMIT
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"--model: {folder} has no readable config.json; name a folder that transformers wrote"
        ) from None
    positions = text_part(config).get("max_position_embeddings")
    return min(_NO_LIMIT, positions) if isinstance(positions, int) else _NO_LIMIT


def _data(
    choices: Choices, place: dict[str, Any], look: RowsLook, kind: str, folder: Path | None,
    target: Path,
) -> None:  # fmt: skip
    path = place.get("path", "")
    is_file = bool(path) and "://" not in path
    source = {**place, **({"path": os.path.relpath(path, target)} if is_file else {})}
    choices.choose("data.train", [source], _of_rows(look, source, kind))
    most = min(_LONGEST, _positions(folder))
    packs = METHODS[kind].packs
    own = min(most, _rounded(look.lengths["0.99"] or most))
    length = min(most, max(own, 1024)) if packs else own
    lines = _lengths(look)
    if look.leaves_all_out:
        lines = "All of the first rows are longer than the model takes."
    elif look.is_split:
        lines = f"Texts are split into pieces of up to {count(length)} tokens."
    if packs and not look.leaves_all_out:
        lines += " Short ones share a sequence, isolated from each other."
    if METHODS[kind].samples_online:
        completion = _completion(most)
        length = min(most, own + completion)
        choices.choose("method.max_completion", completion, "Longest answer, in tokens.")
        lines += " Prompt and answer share it."
    longest = look.lengths["1"]
    if look.format == "text":
        if not look.is_split and (longest is None or longest > length):
            lines += f" Longer ones are split into pieces of up to {count(length)} tokens."
    elif longest is None or longest > length:
        lines += f" Longer ones are left out, and counted; {_cutting(kind)} cuts them instead."
    choices.choose("data.max_length", length, lines)
    if look.lacks_template:
        why = "The tokenizer has no chat template. Its marks get rows of their own."
        choices.choose("data.chat_template", "chatml", why)
        choices.choose("model.add_tokens", "auto", "The marks of ChatML, where they are missing.")


def _lengths(look: RowsLook) -> str:
    """How long the rows are, as far as the model takes them."""
    texts = {"0.5": "Half of the rows have up to {} tokens", "0.99": "99% up to {}"}
    texts["1"] = "the longest {}"
    parts = [
        text.format(count(tokens))
        for share, text in texts.items()
        if (tokens := look.lengths[share]) is not None
    ]
    more = ""
    if look.longer:
        more = f" {percent(look.longer)} of the first rows are longer than the model takes."
    why = "the chat template does not render them" if look.fault else "there is no tokenizer here"
    by = "" if look.is_measured else f"; by their characters, as {why}"
    return f"{', '.join(parts)}{by}.{more}" if parts else more.lstrip()


def _of_rows(look: RowsLook, source: dict[str, Any], kind: str) -> str:
    """What the rows are, and what of them needs a look."""
    lines = f"{_rows(look)[0].upper()}{_rows(look)[1:]}."
    if "columns" in source:
        lines += " columns says which of yours hold question and answer."
        if METHODS[kind].samples_online:
            lines += f" Reward functions get them as {' and '.join(source['columns'])}."
    if look.is_verbatim:
        lines += (
            " Prompts are read as they are, without the chat template; columns with "
            f"{'{instruction: prompt}' if look.format == 'preference' else _AS_CHAT} makes them "
            "conversations."
        )
    if look.bad:
        lines += f" Of the first {look.bad + look.usable}, {look.bad} cannot be used."
    if look.fault:
        lines += f" {_unrendered(look)} with this model: {look.fault}."
    return lines


def _unrendered(look: RowsLook, of: str = "") -> str:
    if look.unrendered == 1:
        return f"None{of} can be used"
    return f"{percent(look.unrendered)}{of} cannot be used"


def _completion(most: int) -> int:
    """Tokens of an answer, of those that the model takes."""
    return min(256, max(16, most // 2))


def _rounded(tokens: int) -> int:
    """The next multiple of 64, or of 256 above 1,024."""
    step = 64 if tokens <= 1024 else 256
    return max(64, math.ceil(tokens / step) * step)


def _adapter(choices: Choices, kind: str) -> None:
    if METHODS[kind].learning_rate_share is None:
        why = "A preference is little information: a small rank is enough."
    else:
        why = "Enough for a change of style or format; much new knowledge needs 64 or more."
    choices.choose("adapter.rank", 16, why)
    choices.choose("adapter.alpha", 32, "With alpha 32 nearly the same rate is good for any rank.")


def _duration(choices: Choices, look: RowsLook, kind: str, workers: int) -> None:
    """Passes over the data, and sequences in a step."""
    sequences = _sequences(choices, look, kind)
    if METHODS[kind].samples_online:
        generations = 8
        batch = generations * max(workers, min(4, max(1, look.rows // 20)))
        choices.choose("method.generations", generations, "Answers to a prompt, compared.")
        choices.choose("optim.batch_size", batch, "Answers in a step: prompts x generations.")
        choices.choose("optim.epochs", 1, "One pass over the prompts.")
        return
    epochs = 3 if look.rows < 1000 else 2 if look.rows < 10_000 else 1
    if METHODS[kind].learning_rate_share is None or kind == "reward":
        epochs = 1
    why = {
        3: "Few rows are seen three times; more passes mostly learn them by heart.",
        2: "A second pass usually still helps, a third one memorises.",
        1: "One pass; more of them learn the rows by heart.",
    }[epochs]
    choices.choose("optim.epochs", epochs, why)
    least = 2 if kind == "kto" else 1
    wished = max(least, min(16, 2 ** int(math.log2(max(1, sequences / _STEPS)))))
    batch = min(max(wished, workers), max(least, sequences))
    steps = max(1, math.ceil(epochs * sequences / batch))
    units = counted(sequences, "packed sequence" if METHODS[kind].packs else "row")
    makes = f"About {units} make{'s'[: sequences == 1]} {counted(steps, 'step')}. "
    why = "LoRA learns well from small batches."
    choices.choose("optim.batch_size", batch, why if look.leaves_all_out else makes + why)


def _provisional(choices: Choices, start: dict[str, Any]) -> dict[str, Any]:
    """The recipe so far, with the absolute paths of the first look."""
    values = {**start, **{name: dict(choices.values[name]) for name in ("adapter", "optim")}}
    values["method"] = {**choices.values["method"], **start["method"]}
    values["data"] = {**choices.values["data"], "train": start["data"]["train"]}
    model = {**choices.values["model"], "base": start["model"]["base"]}
    batch = values["optim"]["batch_size"]
    optim = {**values["optim"], "micro_batch_size": min(4, batch)}
    return {**values, "model": model, "optim": optim}


def _rate(choices: Choices, recipe: Recipe, folder: Path | None) -> None:
    share = recipe.method.learning_rate_share
    suggested = suggested_learning_rate(recipe) if folder is not None else None
    if suggested is not None:
        why = "The rule of thumb for this method, and this model's width."
        if share is None:
            why = "The rule of thumb for preferences and rewards, far below that for imitation."
        why += " finray tune searches around it."
    else:
        suggested = _PREFERENCE_RATE if share is None else _LORA_RATE * share
        why = "The usual rate for LoRA with this method; the model's width would say more."
    choices.choose("optim.learning_rate", suggested, why)


def _memory(
    choices: Choices, recipe: Recipe, gpus: Sequence[Gpu], folder: Path | None, base: str
) -> None:
    """Microbatch, checkpointing and quantisation by the memory of the smallest GPU."""
    room = room_of(gpus)
    batch = recipe.optim.batch_size
    share = max(1, batch // max(1, len(gpus)))
    if room is None:
        choices.choose(
            "optim.micro_batch_size", min(4, share),
            "No GPU is here, so this is a guess; auto decides on a GPU by its memory.",
        )  # fmt: skip
        return
    if folder is None:
        _by_name(choices, base, gpus)
        return
    from ...training.models import import_peft  # noqa: F401 - before what loads peft
    from ...training.models.memory_estimate import estimate, sizes_of
    from ...training.models.placement import decide

    by_type: dict[str, Sizes] = {}
    for quantize in ("none", "nf4"):
        model = recipe.model.model_copy(
            update={"quantize": quantize, "gradient_checkpointing": "auto"}
        )
        optim = recipe.optim.model_copy(update={"micro_batch_size": "auto"})
        scale = recipe.scale.model_copy(update={"workers": max(1, len(gpus))})
        open_ = recipe.model_copy(update={"model": model, "optim": optim, "scale": scale})
        try:
            sizes = sizes_of(open_)
        except InputError:
            if quantize == "none":
                raise
            break  # the model takes no quantisation
        by_type[quantize] = sizes
        placed = decide(open_, sizes, room)
        chosen = quantize
        verdict = judge(open_, by_type, [gpu for gpu in gpus if gpu.bytes])
        if verdict.fits and not verdict.is_tight:
            break
    text = memory_text(estimate(placed, sizes, room.compute), placed)
    smallest = min(gpus, key=lambda gpu: gpu.bytes or 0)
    fits = f"of {amount(room.bytes)} ({smallest.name}): {text}."
    if not (verdict.fits and not verdict.is_tight):
        fits = f"It may not fit: {verdict.text}."
    choices.choose("optim.micro_batch_size", placed.optim.microbatch, f"By the estimate, {fits}")
    if chosen != "none":
        why = "In 16 bits the model does not fit; the frozen base in 4 bits does (QLoRA)."
        choices.choose("model.quantize", chosen, why)
    why = "Less memory for about a third more time, which this GPU needs."
    if not placed.model.checkpoints:
        why = "The activations fit without recomputing them."
    choices.choose("model.gradient_checkpointing", placed.model.checkpoints, why)


def _by_name(choices: Choices, base: str, gpus: Sequence[Gpu]) -> None:
    """What the model's name says of its size."""
    room = room_of(gpus)
    match = _SIZE.search(base.rpartition("/")[2].replace("-", " ").replace("_", " "))
    assert room is not None
    choices.choose(
        "optim.micro_batch_size", "auto",
        "As many as the GPU holds, decided when the run first starts.",
    )  # fmt: skip
    if match is None:
        return
    size = float(match[1]) * (1e9 if match[2].lower() == "b" else 1e6)
    if 2 * size > 0.7 * room.bytes:
        why = f"By its name the model has {match[0]} weights: {amount(2 * size)} in 16 bits are "
        why += f"too much for {amount(room.bytes)}, so the frozen base is kept in 4 bits (QLoRA)."
        choices.choose("model.quantize", "nf4", why)


def _workers(choices: Choices, gpus: Sequence[Gpu], kind: str) -> None:
    optim = choices.values["optim"]
    rows = optim["batch_size"]
    if METHODS[kind].samples_online:
        rows //= choices.values["method"]["generations"]
    if len(gpus) > 1 and rows >= len(gpus):
        choices.choose("scale.workers", len(gpus), "One on each GPU of this machine.")


def _held_out_share(look: RowsLook) -> float:
    if look.rows < _LEAST_ROWS:
        return 0.0
    return 0.05 if look.rows >= 400 else 0.1


def _sequences(choices: Choices, look: RowsLook, kind: str) -> int:
    """Sequences of an epoch, about."""
    share = 1 - _held_out_share(look)
    rows = round(look.kept * share)
    if METHODS[kind].packs and not look.leaves_all_out:
        packed = math.ceil(look.tokens * share / choices.values["data"]["max_length"])
        rows = packed if look.format == "text" else min(rows, packed)
    return max(1, rows)


def _held_out(choices: Choices, look: RowsLook, kind: str) -> None:
    share = _held_out_share(look)
    if not share:
        return
    rows = max(1, round(look.kept * share))
    verb = f"measure{'s'[: rows == 1]}"
    what = f"About {counted(rows, 'row')} {verb}"
    why = f"{what} whether the model still learns, or only memorises."
    choices.choose("data.holdout", share, why)
    optim = choices.values["optim"]
    per_step = optim["batch_size"] // choices.values["method"].get("generations", 1)
    steps = math.ceil(optim["epochs"] * _sequences(choices, look, kind) / max(1, per_step))
    if steps >= 20:
        every = max(5, steps // 10)
        choices.choose("eval.every_steps", every, "About ten measurements of held-out rows.")
    if METHODS[kind].has_answers:
        samples = min(20, rows)
        choices.choose("eval.samples", samples, "Held-out prompts answered before and after.")
