"""Adapters, quantisation, new tokens and templates of another project's configuration."""

from collections.abc import Sequence

from .draft import Draft
from .places import Places

_ALL = ("all", "all-linear", "all_linear")
_PATTERN = frozenset("()|*+?[\\^$")


def targets(draft: Draft, name: str, value: Sequence[str]) -> None:
    """What gets an adapter.

    Args:
        draft: the draft.
        name: the setting.
        value: its names; one with the signs of a regular expression is one.
    """
    if any(item in _ALL for item in value):
        draft.put("adapter.targets", "all-linear", name)
        more = [item for item in value if item not in _ALL]
        if more:
            draft.change(name, f"all-linear; without {', '.join(more)}, which it names beside it")
        return
    is_pattern = len(value) == 1 and bool(_PATTERN & set(value[0]))
    draft.put("adapter.targets", value[0] if is_pattern else list(value), name)


def quantise(draft: Draft, kind: str, name: str, adapts: bool) -> None:
    """The frozen base in fewer bits; without an adapter nothing is frozen."""
    if adapts:
        draft.put("model.quantize", kind, name)
    else:
        draft.change(name, "none: quantised weights are not trained, and there is no adapter")


def existing_adapter(draft: Draft, name: str, places: Places) -> bool:
    """An adapter to train on, whose rank and targets come with it."""
    paths = draft.settings.texts(name)
    if not paths:
        return False
    draft.put("model.adapter", places.model(paths[-1]), name)
    if len(paths) > 1:
        draft.change(
            name, f"{paths[-1]}; merge the others into a base first (finray export --merge)"
        )
    for key in [key for key in draft.values if key.startswith("adapter.")]:
        del draft.values[key]
    return True


def tokens(draft: Draft, *names: str) -> None:
    """Tokens that get a row of their own."""
    added: list[str] = []
    for name in names:
        value = draft.settings.value(name)
        if isinstance(value, dict):
            added += [str(token) for token in value.values()]
        elif value is not None:
            added += draft.settings.texts(name)
    if not added:
        return
    if "method.reference_model" in draft.values:
        for name in names:
            draft.leave(name, "new tokens, for which the reference model has no rows")
        return
    draft.put("model.add_tokens", list(dict.fromkeys(added)), *names)


def chatml(draft: Draft, *names: str) -> None:
    """ChatML, whose marks get rows where the tokenizer lacks them."""
    draft.put("data.chat_template", "chatml", *names)
    is_free = "method.reference_model" not in draft.values
    if is_free and "model.adapter" not in draft.values and "model.add_tokens" not in draft.values:
        draft.put("model.add_tokens", "auto", note="ChatML's marks, where the tokenizer lacks them")


def own_template(draft: Draft, key: str, name: str) -> None:
    """The model's own chat template in the place of one that another project has."""
    draft.change(
        key,
        f"{name}: the model's own chat template; a model without one needs a Jinja text or file in "
        "data.chat_template, such as that of its chat version",
    )


def attention(draft: Draft, name: str) -> None:
    """The attention kernel."""
    own = draft.settings.text(name)
    if own is None:
        return
    if own.lower() == "eager":
        draft.put("model.attention", "eager", name)
    else:
        draft.fulfilled("model.attention: auto, documents one at a time", name)
