"""A result stops in plain transformers where finray's samples stop."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finray.training.common.storage import Folder
from finray.training.config.recipe import recipe_from_dict
from finray.training.export.export import export
from finray.training.launch.in_process import InProcessLauncher
from finray.training.models.generation import completion_texts, generate_completions
from finray.training.models.stopping import stop_tokens, turn_end
from finray.training.run import train

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

EOS, END = "<pad>", "<|im_end|>"
LONGEST = 20


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base like many: its text ends in another token than its chat template's turns."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("base") / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = EOS
    tokenizer.save_pretrained(folder)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations with always the same short answer."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{number}"},
                {"role": "assistant", "content": "dog"},
            ]
        }
        for number in range(120)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trained(folder: Path, base: Path, rows: Path, **optim: Any) -> Path:
    """The folder of a run; without `max_steps` it is of one step that changes little."""
    values = {
        "name": "run",
        "model": {"base": str(base)},
        "adapter": {"rank": 2} if not optim else None,
        "data": {"train": [{"path": str(rows)}], "max_length": 64, "packing": False},
        "optim": {"batch_size": 8, "micro_batch_size": 8, "max_steps": 1, **optim},
        "log": {"to": []},
        "scale": {"workers": 0},
        "storage": str(folder),
    }
    record = train(recipe_from_dict(values), InProcessLauncher())
    assert record["status"] == "finished"
    return folder / "run"


@pytest.fixture(scope="module")
def whole(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all weights that learns to end its answers."""
    folder = tmp_path_factory.mktemp("whole")
    optim = {"max_steps": 30, "learning_rate": 1e-2, "schedule": "constant", "warmup_ratio": 0}
    return trained(folder, base, chats, **optim)


@pytest.fixture(scope="module")
def taught(base: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with the learnt weights; by its files it ends in its own token."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("taught") / "base")
    shutil.copy(whole / "model" / "model.safetensors", folder)
    return folder


@pytest.fixture(scope="module")
def adapted(taught: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("adapted"), taught, chats)


def check_stops(folder: Path, model: Any, tokenizer: Any) -> None:
    """Plain generation ends with the turn, as the samples of the run did."""
    assert tokenizer.eos_token == END
    config = json.loads((folder / "generation_config.json").read_bytes())
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids([EOS, END])
    messages = [{"role": "user", "content": "7"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :].tolist()
    assert answer[-1] == tokenizer.convert_tokens_to_ids(END) and len(answer) < LONGEST
    prompt = inputs["input_ids"][0].tolist()
    completions = generate_completions(model, tokenizer, [prompt], LONGEST, 0, 1)
    (text,) = completion_texts(tokenizer, completions)
    assert tokenizer.decode(answer, skip_special_tokens=True) == text


@pytest.mark.long
def test_an_adapter_stops(taught: Path, adapted: Path, tmp_path: Path) -> None:
    for folder in (adapted / "adapter", tmp_path / "out"):
        if not folder.exists():
            export(Folder(str(adapted)), folder)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(taught), folder)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        check_stops(folder, model.eval(), AutoTokenizer.from_pretrained(folder))


def test_the_card_of_an_adapter_says_how(adapted: Path, tmp_path: Path) -> None:
    export(Folder(str(adapted)), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    program = card.partition("```python\n")[2].partition("```")[0]
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig" in card
    assert "model.generation_config = GenerationConfig.from_pretrained(folder)" in program


def test_a_merged_adapter_stops(adapted: Path, tmp_path: Path) -> None:
    export(Folder(str(adapted)), tmp_path / "out", merge=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    check_stops(tmp_path / "out", model.eval(), AutoTokenizer.from_pretrained(tmp_path / "out"))


def test_a_whole_model_stops(whole: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    check_stops(whole / "model", model.eval(), AutoTokenizer.from_pretrained(whole / "model"))


def test_text_without_turns_ends_as_the_base_does(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"The {n} quick brown", "completion": " fox jumps."} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = trained(tmp_path, base, data)
    assert AutoTokenizer.from_pretrained(run / "adapter").eos_token == EOS
    config = json.loads((run / "adapter" / "generation_config.json").read_bytes())
    assert config["eos_token_id"] == [0, 2]


TEMPLATES = {
    "<|im_start|>{role}\n{content}<|im_end|>\n": END,
    "[{role}] {content} <|im_end|>": END,
    "{role}: {content}\n": None,
    "{role}: {content}. ": None,
    "{role}: {content}<pad>": "<pad>",
}
"""How a template writes a message, and the token that ends the turn."""


@pytest.mark.parametrize("message", TEMPLATES)
def test_the_end_of_a_turn(tiny_model: Path, message: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = message.replace("{role}", "{{ m.role }}").replace("{content}", "{{ m.content }}")
    tokenizer.chat_template = "{% for m in messages %}" + text + "{% endfor %}"
    expected = TEMPLATES[message]
    assert turn_end(tokenizer) == (
        None if expected is None else tokenizer.convert_tokens_to_ids(expected)
    )


@pytest.mark.parametrize("template", [None, "{{ raise_exception('no') }}", "{% if %}"])
def test_without_a_usable_template_the_model_decides(
    tiny_model: Path, template: str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.eos_token_id = [7, 8]
    assert stop_tokens(model, tokenizer) == [2, 7, 8]


def test_settings_of_a_base_are_kept(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    """Also those that transformers would not save: a temperature beside greedy decoding."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    file = base / "generation_config.json"
    config = {**json.loads(file.read_bytes()), "temperature": 0.6, "do_sample": False}
    file.write_text(json.dumps(config), encoding="utf-8")
    run = trained(tmp_path, base, chats)
    written = json.loads((run / "adapter" / "generation_config.json").read_bytes())
    assert written["temperature"] == 0.6 and written["eos_token_id"] == [2]
    assert GenerationConfig.from_pretrained(run / "adapter").temperature == 0.6
