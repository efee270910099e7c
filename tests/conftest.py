"""Tiny models and tokenizers, made once a session; no test reaches a hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("FINRAY_STORAGE", None)
os.environ.pop("FINRAY_ADDRESS", None)
os.environ.pop("FINRAY_LOG_LEVEL", None)
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray's workers give way to all other processes by default, those of other tests among them.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Some virtual CPUs announce instructions for bfloat16 that they fault on.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

import gc
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.forking import ForkServer
from support.rehearsed import CHILD, without_child
from xdist import is_xdist_controller
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from finray.training.rehearsal import child

# Fixtures that files share train as well, before a test's own can say how.
without_child()

# Until all is loaded, which is a sixth faster without a search for garbage.
gc.disable()

# No test cuts the power: what a killed process has written stays, and no disk is waited for.
os.fsync = lambda _: None

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "A tiny model learns a tiny task, quickly and for ever.",
    'user assistant system {"name": "Ada", "order": "12345"} 0 1 2 3 4 5 6 7 8 9',
)


MANY = 50_000
"""Objects that are searched for garbage in a few hundredths of a second."""
SPREAD = {
    f"tests/{name}.py"
    for name in (
        *("against_trl/test_losses", "against_trl/test_online_losses"),
        *("e2e/test_online", "e2e/test_tune"),
        *("unit/models/test_feature_pairs", "unit/config/test_fuzz"),
        *("families/test_matrix", "families/test_tenth"),
    )
}
"""Files whose tests share no fixture that takes long."""


FORKED = {
    f"tests/unit/{name}.py"
    for name in (
        *("export/test_tensor_files", "launch/test_local_workers", "models/test_feature_pairs"),
        *("rehearsal/test_packing", "tuning/test_trial_actor"),
    )
}
"""Files that use `fork_server`, whose start takes ten seconds of CPU."""


class _Files(LoadScopeScheduling):
    """A file's tests stay in one process, but for those of `SPREAD`.

    Without commands, which are forked in every process, one process alone starts a fork server.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if file in FORKED and not any(name.startswith("tests/e2e/") for name in self.collection):
            return "forked"
        return nodeid if file in SPREAD else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _Files(config, log)


@pytest.hookimpl(tryfirst=True)  # before items are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items):
        _skip_without_gpu(items)


def pytest_sessionstart(session: pytest.Session) -> None:
    if is_xdist_controller(session):  # which collects nothing
        gc.enable()


def pytest_collection_finish() -> None:
    """What is loaded by now stays: each training collects garbage, and need not search it."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _skip_without_gpu(items: list[pytest.Item]) -> None:
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="module", autouse=True)
def little_to_search() -> None:
    """What the files before this one have loaded later than `pytest_collection_finish`."""
    if len(gc.get_objects()) > MANY:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def rehearsal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests with the marker `rehearses` start the child process of a rehearsal."""
    if request.node.get_closest_marker("rehearses"):
        monkeypatch.setattr(child, "_Child", CHILD)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Forks commands and workers, Ray's too, that have their libraries loaded."""
    server = ForkServer.launch()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server
    server.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama of 128 positions, and its ChatML tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_rows() -> list[dict[str, object]]:
    """240 two-message conversations, each with an answer that follows from its question."""
    rows: list[dict[str, object]] = []
    for number in range(240):
        question = f"What comes after {number}?"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"After {number} comes {number + 1}."},
        ]
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory, chat_rows: list[object]) -> Path:
    """`chat_rows` as JSON Lines."""
    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows), encoding="utf-8")
    return path
