"""A small tokenizer, and recipes over data that a test writes."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
from safetensors.numpy import save_file

from finray.training.config.recipe import Recipe, recipe_from_dict
from finray.training.data.chat import CHATML
from finray.training.data.render_settings import RenderSettings
from finray.training.data.rendering import Renderer

SHARED = Path(__file__).parents[4] / "shared" / "data"
WORDS = "one two three four five six seven eight nine ten the a model learns to answer questions."


def train_tokenizer(folder: Path, texts: Iterable[str], size: int = 400) -> Path:
    """Train a byte-level BPE with ChatML and bos; returns its model folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHATML,
    )
    tokenizer.save_pretrained(folder)
    config = {"model_type": "llama", "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose weights are a single number."""
    folder = train_tokenizer(tmp_path_factory.mktemp("model"), [WORDS] * 3)
    save_file({"number": np.ones(1, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


class MakeRecipe(Protocol):
    def __call__(self, **data: Any) -> Recipe: ...


@pytest.fixture
def make_recipe(model: Path) -> MakeRecipe:
    """Makes a recipe from data settings; `train` and `eval` may be single paths. `method`, `optim`
    and `base` set the recipe's other sections."""

    def make(**data: Any) -> Recipe:
        sections = {key: data.pop(key) for key in ("method", "optim") if key in data}
        base = str(data.pop("base", model))
        for name in ("train", "eval"):
            if isinstance(data.get(name), str | Path):
                data[name] = [{"path": str(data[name])}]
        values = {"max_length": 64, **data}
        return recipe_from_dict({"name": "t", "model": {"base": base}, "data": values, **sections})

    return make


@pytest.fixture
def make_renderer(tokenizer: Any, make_recipe: MakeRecipe) -> Any:
    def make(**data: Any) -> Renderer:
        recipe = make_recipe(train="/nowhere.jsonl", **data)
        return Renderer(tokenizer, RenderSettings.of(recipe))

    return make


def write_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """Write one JSON value per line; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_row(question: str, answer: str) -> dict[str, Any]:
    """A row of the messages format."""
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }
