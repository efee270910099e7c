"""Make the quickstart's tokenizer and an untrained base model of its size.

The tokenizer is a byte-level BPE trained on the corpus that ``make_data.py --corpus`` writes.  A
capital letter is a token and a number is split into pairs of digits, so that a name or a number
has nearly the same tokens in any position. Copying needs this.

    python make_tokenizer.py --corpus corpus.jsonl --out skeleton
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, START, END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
PIECES = r" ?\p{Lu}| ?\p{Ll}+|\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)


def make_tokenizer(corpus: Path, size: int, context: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the texts of a corpus."""
    texts = (json.loads(line)["text"] for line in corpus.open(encoding="utf-8"))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(word, special=True) for word in (PAD, BOS, START, END)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    make: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return make(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def make_config(tokenizer: PreTrainedTokenizerFast, context: int) -> LlamaConfig:
    """Return the configuration of the base model."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.08,
        dtype="float32",
    )


def main() -> None:
    """Write the tokenizer and the untrained model into one folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="texts, from make_data.py")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--vocabulary", type=int, default=1536, help="number of tokens")
    parser.add_argument("--context", type=int, default=1024, help="positions of the model")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first weights")
    args = parser.parse_args()
    tokenizer = make_tokenizer(args.corpus, args.vocabulary, args.context)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(make_config(tokenizer, args.context))
    tokenizer.save_pretrained(args.out)
    model.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
