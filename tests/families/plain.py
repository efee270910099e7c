"""The same training by transformers, PEFT and torch alone: one document at a time."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from bitsandbytes import functional
from families.matrix import CAUSAL, IMAGE_TEXT, UNSHIFTED
from peft import PeftModel
from transformers import AutoConfig

from finray.training.config.recipe import Recipe
from finray.training.data.prepared import Prepared
from finray.training.data.stream import Sequence, Slice, stream

IGNORED = -100

Document = tuple[torch.Tensor, torch.Tensor]
"""Token ids and labels, of shape (1, tokens)."""


def documents(recipe: Recipe, prepared: Prepared, steps: int) -> list[list[Document]]:
    """The documents of each step of a run."""
    size = recipe.rows_per_step
    whole = Slice(
        folder=prepared.files,
        split=prepared.manifest.train,
        seed=recipe.seed,
        batch_size=size,
        rank=0,
        world_size=1,
        start_step=0,
        stop_step=steps,
    )
    rows = list(stream(whole, on_ray=False))
    return [
        [document for row in rows[step * size : (step + 1) * size] for document in _apart(row)]
        for step in range(steps)
    ]


def _apart(row: Sequence) -> Iterator[Document]:
    start = 0
    for length in row.lengths:
        ids = torch.tensor(row.input_ids[start : start + length]).long()[None]
        is_trained = torch.tensor(row.trainable[start : start + length])[None]
        yield ids, ids.masked_fill(~is_trained, IGNORED)
        start += int(length)


def load(folder: Path, **arguments: Any) -> Any:
    """A model in float32 by the class of transformers that loads all of its checkpoint."""
    config = AutoConfig.from_pretrained(folder)
    kind, has_parts = config.model_type, config.get_text_config() is not config
    is_whole = kind in IMAGE_TEXT and (has_parts or kind not in CAUSAL)
    auto = "AutoModelForImageTextToText" if is_whole else "AutoModelForCausalLM"
    return getattr(transformers, auto).from_pretrained(folder, dtype=torch.float32, **arguments)


@torch.no_grad()
def rounded(model: Any, names: Iterable[str]) -> Any:
    """A model some of whose weights have the values that NF4 gives them."""
    for name in names:
        weight = model.get_parameter(name)
        codes, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        weight.copy_(functional.dequantize_4bit(codes, state))
    return model


def with_new_adapter(base: Any, run: Path) -> Any:
    """The adapter with which a run began, as PEFT alone loads it.

    Its first step changes the B matrices alone, which were zero: the gradient of A is their
    product.
    """
    first = run / "checkpoints" / "step-00000001"
    model = PeftModel.from_pretrained(base, first, is_trainable=True, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return model


def with_adapter(base: Any, folder: Path) -> Any:
    """A trained adapter as PEFT loads it."""
    return PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)


def train_plainly(model: Any, steps: list[list[Document]], learning_rate: float) -> list[float]:
    """The loss of each step of AdamW, as transformers computes it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    model.train()
    losses = []
    for step in steps:
        units = sum(_units(labels) for _, labels in step)
        total = 0.0
        for ids, labels in step:
            mean = _mean(model, ids, labels)
            loss = mean * _units(labels) / units
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def _mean(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean loss of a document's tokens, as transformers computes it where it can."""
    if model.config.model_type in UNSHIFTED:
        scores = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(scores.flatten(0, 1), labels[:, 1:].flatten())
    loss: torch.Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    return loss


def _units(labels: torch.Tensor) -> int:
    return int((labels[:, 1:] != IGNORED).sum())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of some tokens, without dropout."""
    ids = torch.arange(3, 43)[None]
    value: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return value.float()


def assert_near(one: torch.Tensor, other: torch.Tensor, share: float = 1e-3) -> None:
    """Equal within a share of the largest logit, after steps of AdamW."""
    largest = float(other.abs().max())
    torch.testing.assert_close(one, other, rtol=0.0, atol=share * largest)
