"""`finray generate` on Ray's workers writes what one process writes."""

import json
from pathlib import Path

import pytest
from support.finished_run import finished_run

import finray
from finray.training.config.source import Source
from finray.training.evaluation.answering import AnswerSettings
from finray.training.evaluation.generate import generate
from finray.training.evaluation.located import locate
from finray.training.evaluation.opened import base_of, open_located

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
