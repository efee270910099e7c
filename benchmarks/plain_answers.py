"""Answers with transformers and peft alone, as many people write it: what answers.py compares with.

    plain_answers.py chat ADAPTER MESSAGE
    plain_answers.py eval ADAPTER ROWS MAX_TOKENS BATCH

`chat` streams an answer. `eval` answers ROWS, JSON Lines with `messages`, in batches of similar
length, and prints the loss and the share of exact matches.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, TextStreamer


def load(adapter: str) -> tuple[Any, Any]:
    """The model in evaluation mode, and its tokenizer."""
    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(adapter, padding_side="left")


def chat(adapter: str, message: str) -> None:
    """Stream the answer to one message."""
    model, tokenizer = load(adapter)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=32, do_sample=False, streamer=streamer)


@torch.no_grad()
def loss_of(model: Any, tokenizer: Any, rows: list[Any], batch: int) -> float:
    """The mean loss of the answers' tokens, in nats."""
    total, count = 0.0, 0
    pad = tokenizer.pad_token_id or 0
    examples = []
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        examples.append((ids, len(tokenizer(prompt, add_special_tokens=False)["input_ids"])))
    examples.sort(key=lambda example: len(example[0]))
    for first in range(0, len(examples), batch):
        some = examples[first : first + batch]
        longest = max(len(ids) for ids, _ in some)
        tokens = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in some])
        labels = torch.full_like(tokens, -100)
        for row, (ids, prompt) in enumerate(some):
            labels[row, prompt : len(ids)] = torch.tensor(ids[prompt:])
        mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in some])
        logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1]
        chosen = labels[:, 1:] != -100
        losses = torch.nn.functional.cross_entropy(logits[chosen], labels[:, 1:][chosen])
        total += float(losses) * int(chosen.sum())
        count += int(chosen.sum())
    return total / count


def evaluate(adapter: str, path: str, max_tokens: int, batch: int) -> None:
    """Loss and exact match of some rows."""
    model, tokenizer = load(adapter)
    with Path(path).open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    loss = loss_of(model, tokenizer, rows, batch)
    prompts = [
        tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    order = sorted(range(len(rows)), key=lambda number: len(prompts[number]))
    right = 0
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        texts = [prompts[number] for number in some]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        made = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answers = tokenizer.batch_decode(
            made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for number, answer in zip(some, answers, strict=True):
            right += answer.strip() == rows[number]["messages"][-1]["content"].strip()
    print(json.dumps({"loss": loss, "exact_match": right / len(rows)}))


def main() -> None:
    """Chat, or evaluate."""
    kind, adapter, *rest = sys.argv[1:]
    if kind == "chat":
        chat(adapter, *rest)
    else:
        evaluate(adapter, rest[0], int(rest[1]), int(rest[2]))


if __name__ == "__main__":
    main()
