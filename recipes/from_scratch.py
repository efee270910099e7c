"""LoRA fine-tuning in one flat loop, without finray: what a run does, to read from top to bottom.

    python recipes/from_scratch.py

It trains the quickstart's model on the quickstart's rows, as this command does:

    finray train recipes/quickstart/sft.yaml --local --set data.packing=false

A test compares the losses: in the same order of rows they are equal to finray's.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

QUICKSTART = Path(__file__).parent / "quickstart"
parser = argparse.ArgumentParser()
parser.add_argument("--base", default=QUICKSTART / "base", help="model: a folder or a hub id")
parser.add_argument("--rows", type=Path, default=QUICKSTART / "train.jsonl")
parser.add_argument("--out", default="runs/from-scratch", help="where the adapter goes")
args = parser.parse_args()

MAX_LENGTH = 512
BATCH, MICROBATCH = 8, 4  # rows of an optimizer step, and of a forward pass
LEARNING_RATE, WARMUP = 3e-3, 0.05  # the rate's peak, and the share of the steps before it

# 1. The rows as tokens. A label of -100 means: no loss here. The answer is trained; the prompt
#    before it, which ends with the template's opening of the assistant's turn, is only read.
tokenizer = AutoTokenizer.from_pretrained(args.base)
examples = []
for line in args.rows.read_text(encoding="utf-8").splitlines():
    messages = json.loads(line)["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    # The template has written the special tokens already, so the tokenizer must not add its own.
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # Each token knows its first character. Counting the prompt's tokens instead would go wrong
    # where prompt and answer share one.
    starts = [first for first, _ in tokens["offset_mapping"]]
    labels = [
        token if first >= len(prompt) else -100
        for token, first in zip(tokens["input_ids"], starts, strict=True)
    ]
    if len(labels) <= MAX_LENGTH:
        examples.append((tokens["input_ids"], labels))

# 2. The model. The base is frozen; beside every linear layer W (but the head) LoRA puts two thin
#    matrices: x W + (alpha / rank) x A B. B starts at zero, so the first step sees the base itself.
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
lora = LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules="all-linear")
model = get_peft_model(base, lora).to(device).train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)

# 3. The steps. One pass in the order of the file, whose rows are in random order already. finray
#    shuffles by seed and epoch.
steps = len(examples) // BATCH
warmup = math.floor(WARMUP * steps)
for step in range(steps):
    batch = examples[step * BATCH : (step + 1) * BATCH]
    # Every token of the step weighs the same, whichever microbatch it is in: so the loss is a sum,
    # divided by the number of trained tokens in the whole step. A mean of the microbatches' means
    # would prefer the tokens of short answers. (No token predicts the first one.)
    count = sum(label != -100 for _, labels in batch for label in labels[1:])
    total = 0.0
    for first in range(0, BATCH, MICROBATCH):
        rows = batch[first : first + MICROBATCH]
        longest = max(len(ids) for ids, _ in rows)
        # Padding stands at the end, where no token of the row looks: attention reads backward
        # only. So there is no attention mask, and any token will do.
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
        targets = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
        logits = model(input_ids=ids.to(device), use_cache=False).logits
        # The logits at one place predict the token at the next.
        predictions, following = logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten().to(device)
        loss = cross_entropy(predictions, following, ignore_index=-100, reduction="sum") / count
        loss.backward()  # gradients of the microbatches add up
        total += loss.item()
    # The rate rises in a line from zero, then falls as half a cosine.
    done = (step - warmup) / max(1, steps - warmup)
    share = step / warmup if step < warmup else (1 + math.cos(math.pi * done)) / 2
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE * share
    torch.nn.utils.clip_grad_norm_(trained, max_norm=1.0)  # one odd batch must not throw it off
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step + 1:3d} of {steps}  rate {LEARNING_RATE * share:.1e}  loss {total:.7f}")

# 4. The result: A and B alone, a few megabytes. PeftModel.from_pretrained(base, folder) loads it.
model.save_pretrained(args.out)
