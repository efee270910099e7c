"""Answers and losses of other processes and of vLLM's engine, with stand-ins for both."""

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from support.finished_run import finished_run
from transformers import AutoModelForCausalLM

import finray
from finray.training.common.errors import RunError
from finray.training.common.storage import Folder
from finray.training.config.source import Source
from finray.training.evaluation.answer_settings import AnswerSettings
from finray.training.evaluation.elsewhere import AnswerTask, Remote, by_tasks
from finray.training.evaluation.evaluate import EvaluationSettings
from finray.training.evaluation.generate import generate
from finray.training.evaluation.located import locate
from finray.training.evaluation.opened import open_unloaded
from finray.training.evaluation.results import candidates_of, write_evaluation

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
Write = Callable[[Path, list[Any]], Path]
Read = Callable[[Path], list[Any]]
ROWS: list[Any] = [
    {
        "messages": [
            {"role": "user", "content": "tiny " * n},
            {"role": "assistant", "content": "fox"},
        ]
    }
    for n in (1, 9, 2, 30, 3, 1, 4, 12)
] + [{"text": "no prompt"}, {"prompt": "the quick"}]


class Backwards:
    """Runs the last item first, as workers may finish in any order."""

    runs = 0

    def __call__(
        self, task: Callable[[Any], Any], items: Sequence[Any], on_gpus: bool = False
    ) -> Iterator[Any]:
        assert on_gpus
        self.runs += 1
        return map(task, reversed(items))


def test_workers_write_what_one_process_writes_and_go_on_after_a_kill(
    run: Path, tmp_path: Path, write: Write
) -> None:
    prompts = write(tmp_path / "rows.jsonl", ROWS)
    finray.generate(run, prompts, tmp_path / "alone.jsonl", max_tokens=4, batch=2, base=True)
    target = tmp_path / "elsewhere.jsonl"
    source = [Source(path=str(prompts))]
    located = locate(str(run), Path.cwd())
    opened = open_unloaded(located)
    assert next(opened.model.parameters()).is_meta
    settings = AnswerSettings(max_tokens=4, at_once=2)
    remote = (Remote(located.uri), Remote(located.uri, is_base=True))
    asked: list[int] = []

    def killed(
        task: Callable[[Any], Any], items: Sequence[Any], on_gpus: bool = False
    ) -> Iterator[Any]:
        for item in list(reversed(items))[: 2 if not asked else None]:
            asked.extend(ask.row.number for ask in item[1])
            yield task(item)
        if len(asked) < len(ROWS) - 1:
            raise KeyboardInterrupt

    def once() -> None:
        generate(
            *([opened, opened], source, target, settings),
            identity="x",
            answering=by_tasks(AnswerTask(remote, settings), killed),
        )

    with pytest.raises(KeyboardInterrupt):
        once()
    once()
    assert target.read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    assert sorted(asked) == [1, 2, 3, 4, 5, 6, 7, 8, 10]


@pytest.mark.long
def test_workers_measure_what_one_process_measures(
    run: Path, tiny_model: Path, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finray.training.evaluation.losses._WINDOW", 3)
    sources = [Source(path=str(write(tmp_path / "rows.jsonl", ROWS)))]
    other = finished_run(tmp_path, tiny_model, what="model", run_name="whole")
    records, elsewhere = [], Backwards()
    for name, runner in (("alone", None), ("elsewhere", elsewhere)):
        located, against = locate(str(run), Path.cwd()), locate(str(other), Path.cwd())
        candidates = candidates_of(located, against, True, elsewhere=runner is not None)
        settings = EvaluationSettings(
            ("token_f1",), answers=AnswerSettings(max_tokens=4, at_once=2)
        )
        target = Folder(str(tmp_path / name)).create()
        one = write_evaluation(candidates, sources, target, settings, run=runner)
        records.append({**one.record, "at": None})
    assert records[0] == records[1]
    assert elsewhere.runs == len(candidates)  # loss and answers by the same processes
    values = records[0]["measures"][0]["values"]
    assert values["answer"] != values["base"] == values["against"]
    rows = [(tmp_path / name / "eval.jsonl").read_bytes() for name in ("alone", "elsewhere")]
    assert rows[0] == rows[1]


class Engine:
    """A stand-in for vLLM's engine: greedy, with transformers and PEFT."""

    made: list[dict[str, Any]] = []

    def __init__(self, **arguments: Any) -> None:
        self.made.append(arguments)
        self._base = arguments["model"]

    def generate(
        self, prompts: Any, parameters: Any, *, lora_request: Any, use_tqdm: bool
    ) -> list[Any]:
        model = AutoModelForCausalLM.from_pretrained(self._base, dtype=torch.float32)
        if lora_request is not None:
            model = PeftModel.from_pretrained(model, lora_request.path)
        outputs = []
        for prompt, how in zip(prompts, parameters, strict=True):
            ids = torch.tensor([prompt["prompt_token_ids"]])
            made = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=how.max_tokens,
                do_sample=False,
                eos_token_id=how.stop_token_ids,
            )[0, ids.shape[1] :].tolist()
            ended = made[-1] in how.stop_token_ids
            one = SimpleNamespace(token_ids=made, finish_reason="stop" if ended else "length")
            outputs.append(SimpleNamespace(outputs=[one]))
        return outputs


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.lora", "vllm.lora.request")}
    modules["vllm"].__spec__ = ModuleSpec("vllm", None)
    modules["vllm"].LLM = Engine  # type: ignore[attr-defined]
    modules["vllm"].SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    modules["vllm.lora.request"].LoRARequest = (  # type: ignore[attr-defined]
        lambda name, number, path: SimpleNamespace(name=name, number=number, path=path)
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Engine, "made", [])


def test_vllm_gets_the_prompts_the_adapter_and_the_stops(
    stand_in: None, run: Path, tiny_model: Path, tmp_path: Path, write: Write
) -> None:
    """One engine answers for the run and for its base, and the file is that of transformers."""
    prompts = write(tmp_path / "rows.jsonl", ROWS)
    files = [tmp_path / "vllm.jsonl", tmp_path / "transformers.jsonl"]
    for engine, file in zip(("vllm", "transformers"), files, strict=True):
        finray.generate(run, prompts, file, max_tokens=4, base=True, engine=engine)
    assert files[0].read_bytes() == files[1].read_bytes()
    (made,) = Engine.made
    assert made["model"] == str(tiny_model) and made["max_lora_rank"] == 8
    longest = max(len(row) for row in files[0].read_text().splitlines())
    assert 30 < made["max_model_len"] < longest


def test_vllm_is_chosen_where_it_can_load_the_model(
    run: Path, tiny_model: Path, tmp_path: Path, write: Write, request: pytest.FixtureRequest
) -> None:
    prompts = write(tmp_path / "rows.jsonl", ROWS[:1])
    with pytest.raises(ValueError, match="'vlm' is not an engine; give transformers or vllm"):
        finray.generate(run, prompts, tmp_path / "out.jsonl", engine="vlm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--engine: vllm is not installed; pip install"):
        finray.generate(run, prompts, tmp_path / "out.jsonl", engine="vllm")
    request.getfixturevalue("stand_in")
    whole = finished_run(tmp_path, tiny_model, what="model", run_name="whole")
    with pytest.raises(ValueError, match="one model at a time, and the base is another one"):
        finray.generate(whole, prompts, tmp_path / "out.jsonl", engine="vllm", base=True)
    finray.generate(run, prompts, tmp_path / "out.jsonl", max_tokens=1)
    assert not Engine.made  # there is no GPU
    finray.generate(whole, prompts, tmp_path / "whole.jsonl", max_tokens=1, engine="vllm")
    assert Engine.made[0]["model"] == str(whole / "model") and "enable_lora" not in Engine.made[0]


def test_a_broken_vllm_says_what_answers_without_it(
    stand_in: None, run: Path, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was installed for another version of its neighbours raises anything."""

    def broken(**_: Any) -> None:
        raise AttributeError("module 'transformers' has no attribute 'Old'")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", broken)
    prompts = write(tmp_path / "rows.jsonl", ROWS[:1])
    with pytest.raises(RunError, match="has no attribute 'Old'; --engine transformers answers"):
        finray.generate(run, prompts, tmp_path / "out.jsonl", engine="vllm")
