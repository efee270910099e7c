"""Where an answer ends: the one place that decides it for samples, rollouts and written results."""

import copy
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..common.errors import InputError
from ..data.chat import chat_template_of
from ..data.shapes import Message, RowError
from .loading import Model

GENERATION_CONFIG = "generation_config.json"
_ANSWER = "finray-answer"
_TURNS: list[Message] = [
    {"role": "user", "content": "finray-question"},
    {"role": "assistant", "content": _ANSWER},
]


def turn_end(tokenizer: Any) -> int | None:
    """The token that ends an assistant's turn in the tokenizer's chat template.

    None if there is no template, or if text ends the turn instead of a single added token.
    """
    try:
        text = chat_template_of(tokenizer, None).render(_TURNS)
    except (InputError, RowError):
        return None
    rest = text.rpartition(_ANSWER)[2].lstrip()
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    markers = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return int(ids[0]) if ids and ids[0] in markers else None


def stop_tokens(model: Model, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's, the model's and the template's."""
    of_model = model.generation_config.eos_token_id
    own = of_model if isinstance(of_model, list) else [of_model]
    tokens = {tokenizer.eos_token_id, turn_end(tokenizer), *own}
    return sorted(token for token in tokens if token is not None)


def write_stops(model: Model, tokenizer: Any, target: Path) -> None:
    """Write a generation_config.json that stops where samples stop.

    Args:
        model: a language model, or an adapter on one.
        tokenizer: its tokenizer, with the chat template of the training.
        target: the result's folder.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not base.can_generate():
        return
    config = copy.deepcopy(base.generation_config)
    config.eos_token_id = stop_tokens(model, tokenizer) or None
    # Not save_pretrained, which refuses settings that many published models have.
    config.to_json_file(target / GENERATION_CONFIG)


def ending_turns(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer whose end-of-sequence token is the end of an assistant's turn."""
    end = turn_end(tokenizer)
    if end is None or end == tokenizer.eos_token_id:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = tokenizer.convert_ids_to_tokens(end)
    return changed
