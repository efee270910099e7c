"""Generates the benchmarks' models, tokenizers and data; nothing is downloaded."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
PAD_ID = 0
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int) -> int:
    """Train a byte-level BPE tokenizer with a ChatML template. Returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_llama(folder: Path, vocabulary: int, hidden: int, layers: int, context: int) -> None:
    """Save a Llama model with random float32 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class Words:
    """Generates text of made-up words whose frequencies follow Zipf's law."""

    def __init__(self, seed: int = 0, count: int = 20_000) -> None:
        self._random = np.random.default_rng(seed)
        letters = np.array(list("etaoinshrdlucmfwypvbgk"))
        sizes = self._random.integers(2, 10, count)
        self._words = np.array(["".join(self._random.choice(letters, size)) for size in sizes])
        weights = 1.0 / np.arange(5, count + 5)
        self._chances = np.cumsum(weights / weights.sum())

    def text(self, words: int) -> str:
        """A text with the given number of words."""
        drawn = np.searchsorted(self._chances, self._random.random(words))
        return " ".join(self._words[np.minimum(drawn, len(self._words) - 1)])

    def conversations(self, mean_words: int) -> Iterator[dict[str, Any]]:
        """Infinitely many conversations, with answers of log-normal lengths."""
        while True:
            size = int(np.clip(self._random.lognormal(np.log(mean_words), 0.7), 4, 8 * mean_words))
            question, answer = self.text(max(size // 4, 2)), self.text(size)
            yield {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as a JSON Lines file."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def texts_of(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The contents of all messages."""
    for row in rows:
        yield from (message["content"] for message in row["messages"])
