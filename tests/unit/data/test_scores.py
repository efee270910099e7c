"""The stage `score`: which rows stay, whatever the tasks, and what is refused or quarantined."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from finray.training.common.errors import InputError
from finray.training.common.progress import SILENT
from finray.training.common.storage import Folder
from finray.training.config.curation import ScoreStage
from finray.training.config.recipe import Recipe, load_recipe
from finray.training.config.user_code import try_import
from finray.training.data import sources
from finray.training.data.curation.funnel import describe_kinds
from finray.training.data.curation.report import report_of
from finray.training.data.prepare import prepare
from finray.training.data.prepared import Prepared
from finray.training.data.shapes import Example, Text
from finray.training.data.shown_rows import show_rows
from finray.training.data.tasks import run_in_process

from .conftest import MakeRecipe, write_jsonl
from .test_curation import Watched, funnel, left, run, text_of

QUALITY = "def quality(row):\n    return row['quality']\n"


def score(code: str = QUALITY, **settings: Any) -> dict[str, Any]:
    function = {"file": "/rows/score.py:quality", "source": code}
    return {"kind": "score", "with": function, **settings}


def rows(*qualities: Any) -> list[dict[str, Any]]:
    return [{"text": text_of(n), "quality": quality} for n, quality in enumerate(qualities)]


@pytest.fixture
def make(make_recipe: MakeRecipe) -> MakeRecipe:
    def of_texts(**data: Any) -> Recipe:
        return make_recipe(**{"max_length": 512, "method": {"kind": "pretrain"}, **data})

    return of_texts


def test_the_best_share_of_all_sources_together_stays(tmp_path: Path, make: MakeRecipe) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", rows(5, 1.5, 3))
    more = [{"text": text_of(n), "quality": n} for n in (10, 0, 4, 2, -7, 8, 6)]
    second = write_jsonl(tmp_path / "b.jsonl", more)
    both = [{"path": str(first)}, {"path": str(second)}]
    prepared = run(make(train=both, curate=[score(keep_top=0.6)]), tmp_path)
    assert left(prepared) == [0, 2, 3, 5, 8, 9]
    assert funnel(prepared)[1] == ("2 score", 10, 6, {"its score is too low": 4})
    stages = set(json.loads(prepared.folder.read("stages.json")))
    assert stages == {folder.name for folder in (tmp_path / "prepared" / "stages").iterdir()}
    (_, entry) = prepared.manifest.funnel
    assert entry["scores"] == {
        "before": {"lowest": -7, "10%": -7, "median": 3, "90%": 8, "highest": 10},
        "after": {"lowest": 3, "10%": 3, "median": 5, "90%": 8, "highest": 10},
    }
    assert describe_kinds(entry)[0][1].startswith("lowest -7, 10% -7, median 3, ")
    sample = entry["samples"][0]
    assert sample["place"].endswith("a.jsonl:2")
    assert sample["reason"] == "its score is too low (1.5)"
    assert entry["characters_in"] > entry["characters_out"] > 0


def test_a_smallest_score(tmp_path: Path, make: MakeRecipe) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", rows(0.5, 0.49, 7, -1))
    prepared = run(make(train=data, curate=["normalise", score(min=0.5)]), tmp_path)
    assert left(prepared) == [0, 2]


def test_ties_do_not_depend_on_order_or_tasks(
    tmp_path: Path, make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 rows of three scores, each twice: of those at the border, the content decides."""
    every = [row for n in range(100) for row in 2 * rows(*[0] * n, n % 3)[n:]]

    def texts_left(order: Sequence[dict[str, Any]], name: str) -> list[str]:
        data = write_jsonl(tmp_path / f"{name}.jsonl", order)
        recipe = make(train=data, curate=[score(keep_top=0.477)])
        prepared = run(recipe, tmp_path / name)
        assert left(prepared) == sorted(set(left(prepared)))
        return sorted(order[number]["text"] for number in left(prepared))

    whole = texts_left(every, "whole")
    assert len(whole) == 95  # 66 of the highest score, and 29 of 66 with the next one
    with monkeypatch.context() as patch:
        patch.setattr(sources, "CHUNK_BYTES", 700)
        assert texts_left(every, "parts") == whole
    shuffled = random.Random(2).sample(every, len(every))
    assert texts_left(shuffled, "shuffled") == whole


def logging_code(log: Path) -> str:
    """A function that writes a letter for each row."""
    return (
        "def quality(row):\n"
        f"    with open({str(log)!r}, 'a') as file:\n"
        "        file.write('x')\n"
        "    return row['quality']\n"
    )


def test_another_share_computes_no_score_again(tmp_path: Path, make: MakeRecipe) -> None:
    code = logging_code(tmp_path / "log")
    data = write_jsonl(tmp_path / "a.jsonl", rows(*range(10)))
    for settings, first in (({"keep_top": 0.5}, 5), ({"keep_top": 0.7}, 3), ({"min": 8}, 8)):
        prepared = run(make(train=data, curate=["redact", score(code, **settings)]), tmp_path)
        assert left(prepared) == [*range(first, 10)]
    assert (tmp_path / "log").read_text() == "x" * 10


def test_a_killed_stage_keeps_the_scores_of_finished_chunks(
    tmp_path: Path, make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK_BYTES", 500)
    data = write_jsonl(tmp_path / "a.jsonl", rows(*range(12)))
    recipe = make(train=data, curate=[score(logging_code(tmp_path / "log"), keep_top=0.5)])
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, Watched("CutTask"))
    assert left(run(recipe, tmp_path)) == [*range(6, 12)]
    assert (tmp_path / "log").read_text() == "x" * 12


BAD: list[tuple[Any, str]] = [
    ("good", "score quality returns str; expected a number"),
    (None, "score quality returns NoneType; expected a number"),
    (True, "score quality returns bool; expected a number"),
    (math.nan, "score quality returns nan; expected a finite number"),
    (10**400, "score quality returns inf; expected a finite number"),
]


def test_rows_without_a_score_are_quarantined(tmp_path: Path, make: MakeRecipe) -> None:
    values = [1, *(value for value, _ in BAD), 2, 3]
    code = (
        "import numpy as np\n"
        "def quality(row):\n"
        "    row['text'] = 'changes nothing'\n"
        "    if row['quality'] == 3:\n"
        "        return 1 / 0\n"
        "    return np.float32(row['quality']) if row['quality'] == 2 else row['quality']\n"
    )
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(*values)))
    curate = ["normalise", score(code, keep_top=0.5)]
    recipe = make(train=data, curate=curate, max_bad_rows=0.8)
    prepared = run(recipe, tmp_path)
    assert left(prepared) == [6]
    assert funnel(prepared)[1] == ("2 score", 8, 1, {"bad_row": 6, "its score is too low": 1})
    bad = [json.loads(line) for line in prepared.folder.read("quarantine.jsonl").splitlines()]
    assert [entry["reason"] for entry in bad[:-1]] == [reason for _, reason in BAD]
    assert [entry["line"] for entry in bad] == [2, 3, 4, 5, 6, 8]
    assert bad[-1]["reason"] == (
        "score quality raises ZeroDivisionError: division by zero "
        '(File "/rows/score.py", line 5, in quality)'
    )
    with pytest.raises(InputError, match=r"max_bad_rows allows 1\.0%, and 6 of 8 rows"):
        run(make(train=data, curate=curate), tmp_path / "strict")


def test_a_score_that_no_row_reaches_is_refused(tmp_path: Path, make: MakeRecipe) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", rows(1, 2))
    with pytest.raises(InputError, match=r"^data\.curate\.0: score leaves no row to train on"):
        run(make(train=data, curate=[score(min=5)]), tmp_path)


def test_rows_are_shown_with_their_scores(tmp_path: Path, make: MakeRecipe) -> None:
    recipe = make(
        train=write_jsonl(tmp_path / "a.jsonl", rows(1.25, "x", 3)),
        curate=[score(keep_top=0.5)],
        max_bad_rows=0.5,
    )
    folder = Folder(str(tmp_path / "prepared"))
    before = show_rows(recipe, 3, folder).rows
    assert before[0].facts[-1] == "2 score not done yet: finray data report"
    report_of(recipe, folder, run_in_process, SILENT)
    shown = show_rows(recipe, 3, folder).rows
    assert [row.problem for row in shown] == [
        "dropped by 2 score: its score is too low",
        "dropped by 2 score: it has no score, as finray data report says",
        "",
    ]
    assert "score 3" in shown[2].facts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_top": 0.5}, "score needs with, a function, or run"),
        ({"with": "a.py:f", "run": "runs/r", "min": 1}, "score needs with, a function, or run"),
        ({"with": "a.py:f"}, "score needs keep_top, a share, or min"),
        ({"with": "a.py:f", "keep_top": 0.5, "min": 1}, "score needs keep_top, a share, or min"),
        ({"with": "a.py:f", "keep_top": 1.5}, "less than 1"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreStage(**settings)


def test_the_function_travels_and_is_tried_first(tmp_path: Path, model: Path) -> None:
    (tmp_path / "score.py").write_text("raise ValueError('no such table')\n" + QUALITY)
    values = {
        "name": "t",
        "model": str(model),
        "data": {
            "train": str(write_jsonl(tmp_path / "a.jsonl", rows(1))),
            "curate": [{"kind": "score", "with": "score.py:quality", "keep_top": 0.5}],
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values))
    recipe = load_recipe(path)
    (stage,) = recipe.data.curate
    assert isinstance(stage, ScoreStage) and stage.function is not None
    assert stage.function.text.endswith(QUALITY)
    with pytest.raises(InputError, match=r"(?s)data\.curate\.0\.with\.file: .*no such table"):
        try_import(recipe)
    (tmp_path / "score.py").write_text("def quality(row, more):\n    return 1\n")
    with pytest.raises(InputError, match=r"quality must take one argument, the row"):
        load_recipe(path)


# ---- reward models ------------------------------------------------------------------------------


def by_length(run: str) -> Any:
    """In the place of a reward model: the length of a text."""
    assert run == "runs/reward"

    def score_all(examples: Sequence[Example]) -> list[float]:
        return [float(len(one.text)) for one in examples if isinstance(one, Text)]

    return score_all


def test_a_reward_model_scores_what_the_method_reads(tmp_path: Path, make: MakeRecipe) -> None:
    texts = [{"text": "word " * n} for n in (5, 9, 2, 7)]
    data = write_jsonl(tmp_path / "a.jsonl", texts)
    recipe = make(train=data, curate=[{"kind": "score", "run": "runs/reward", "keep_top": 0.5}])
    folder = Folder(str(tmp_path / "prepared"))
    prepared: Prepared = prepare(recipe, folder, run_in_process, open_scorer=by_length)
    assert left(prepared) == [1, 3]
