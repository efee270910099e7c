"""`finray generate` and `finray eval` on Ray's workers write what one process writes."""

import json
from pathlib import Path

import pytest
from support.finished_run import finished_run

import finray
from finray.training.common.storage import Folder
from finray.training.config.source import Source
from finray.training.evaluation.answer_settings import AnswerSettings
from finray.training.evaluation.evaluate import EvaluationSettings
from finray.training.evaluation.generate import generate
from finray.training.evaluation.located import locate
from finray.training.evaluation.opened import base_of, open_located
from finray.training.evaluation.results import candidates_of, write_evaluation

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_the_file_is_that_of_one_process(local_ray: None, tiny_model: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_model)
    rows = [{"prompt": [{"role": "user", "content": f"task {n} " * (1 + n % 3)}]} for n in range(9)]
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text("".join(f"{json.dumps(row)}\n" for row in [*rows, {"text": "none"}]))
    alone, on_ray = tmp_path / "alone.jsonl", tmp_path / "ray.jsonl"
    located = locate(str(run), Path.cwd())
    opened = open_located(located)
    settings = AnswerSettings(max_tokens=5, temperature=1.0, seed=2, at_once=2)
    models = [opened, base_of(opened, located)]
    source = [Source(path=str(prompts))]
    generate(models, source, alone, settings, identity=located.identity)
    finray.generate(
        *(run, prompts, on_ray),
        max_tokens=5,
        temperature=1.0,
        seed=2,
        batch=2,
        base=True,
        workers=2,
    )
    assert on_ray.read_bytes() == alone.read_bytes() and alone.read_bytes().count(b"\n") == 10


def test_the_measures_are_those_of_one_process(
    local_ray: None, tiny_model: Path, tmp_path: Path
) -> None:
    run = finished_run(tmp_path, tiny_model)
    rows = [{"prompt": f"task {n} " * (1 + n % 3), "completion": "fox"} for n in range(9)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    located = locate(str(run), Path.cwd())
    answers = AnswerSettings(max_tokens=5, at_once=2)
    settings = EvaluationSettings(("exact_match", "token_f1"), answers=answers)
    candidates = candidates_of(located, None, base=True)
    source = [Source(path=str(data))]
    alone = write_evaluation(candidates, source, Folder(str(tmp_path / "alone")).create(), settings)
    result = finray.evaluate(
        run, data, base=True, max_tokens=5, batch=2, workers=2, to=tmp_path / "ray"
    )
    assert {**result.record, "at": None} == {**alone.record, "at": None} and not result.problems
