"""Fine-tuning with transformers and peft alone, as many people write it: what start.py starts.

    bare_finetune.py MODEL ROWS OUTPUT

ROWS is JSON Lines with `messages`. Prints a line after the first optimizer step.
"""

import json
import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

FIRST_STEP = "first optimizer step done"
MAX_LENGTH = 512


class PrintFirstStep(TrainerCallback):
    """Prints a line after the first optimizer step."""

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Called after every optimizer step."""
        if state.global_step == 1:
            print(FIRST_STEP, flush=True)


def tokenise(tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """Conversations as token ids; the loss covers only the answer."""
    examples = []
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True
        )
        input_ids = tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_LENGTH]
        masked = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        labels = [-100] * min(masked, len(input_ids)) + input_ids[masked:]
        examples.append({"input_ids": input_ids, "labels": labels})
    return examples


def main() -> None:
    """Read, tokenise, load, train."""
    base, path, output = sys.argv[1:]
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with Path(path).open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    examples = tokenise(tokenizer, rows)
    model = AutoModelForCausalLM.from_pretrained(base)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=1000,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(
        get_peft_model(model, lora),
        arguments,
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[PrintFirstStep()],
    ).train()


if __name__ == "__main__":
    main()
