"""The child process of a rehearsal: its outcome is kept; a crash or a hang rehearses nothing."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from finray.training.config.recipe import Recipe
from finray.training.models.devices import VARIABLE
from finray.training.rehearsal import child
from finray.training.rehearsal.child import Rehearsal, rehearse, rehearse_all
from finray.training.rehearsal.key import key_of
from finray.training.rehearsal.outcome import Outcome

pytestmark = [pytest.mark.rehearses, pytest.mark.filterwarnings("ignore")]

MakeRecipe = Callable[..., Recipe]
OUTCOME = Outcome(
    "ok",
    isolation="mask",
    left_out=("model.layers.*.router",),
    adapted={"q_proj": 2},
    notes=("the result cannot be merged",),
)


class Starts:
    """Starts this Python source in place of the program, and counts."""

    def __init__(self, source: str) -> None:
        self.source, self.count = source, 0
        self.children: list[subprocess.Popen[bytes]] = []

    def __call__(self, errors: IO[bytes]) -> "subprocess.Popen[bytes]":
        self.count += 1
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", self.source]
        self.children.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors))
        return self.children[-1]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Starts]:
    def replace(source: str) -> Starts:
        starts = Starts(source)
        monkeypatch.setattr(child, "start_child", starts)
        return starts

    return replace


def test_a_second_start_runs_no_child(
    make_recipe: MakeRecipe, start: Callable[[str], Starts]
) -> None:
    starts = start(f"print({OUTCOME.to_json()!r})")
    recipe = make_recipe("llama")
    folder = Path(recipe.model.base)
    assert rehearse(recipe) == OUTCOME == rehearse(recipe) and starts.count == 1
    same = recipe.model_copy(update={"name": "other", "seed": 3})
    assert rehearse(same) == OUTCOME and starts.count == 1
    numbers = {"rank": 16, "alpha": 1.5, "rank_pattern": {"q_proj": 8}}
    alike = [
        make_recipe("llama", adapter=numbers | {"rank_pattern": {"q_proj": r}}) for r in (4, 8)
    ]
    assert key_of(alike[0], folder) == key_of(alike[1], folder) != key_of(recipe, folder)
    assert rehearse(make_recipe("llama", adapter={"rank": 32, "alpha": 3})) == OUTCOME
    assert starts.count == 1
    other = make_recipe("llama", adapter={"targets": ["q_proj"]})
    assert rehearse(other) == OUTCOME and starts.count == 2
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"hidden_act": "silu"', '"hidden_act": "gelu"'))
    assert rehearse(recipe) == OUTCOME and starts.count == 3


def test_a_damaged_outcome_is_rehearsed_again(
    make_recipe: MakeRecipe, start: Callable[[str], Starts], tmp_path: Path
) -> None:
    starts = start(f"print({OUTCOME.to_json()!r})")
    recipe = make_recipe("llama")
    rehearse(recipe)
    (kept,) = (tmp_path / "runs" / "prepared" / "rehearsals").iterdir()
    for content in ("{", "{}", "[]", '{"status": 1, "left_out": [], "notes": [], "more": 2}'):
        kept.write_text(content)
        assert rehearse(recipe) == OUTCOME
    assert starts.count == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "import sys; sys.exit('first\\nno kernel image')",
            "it ended with exit code 1: no kernel image",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "it ended with SIGILL"),
        ("print('no JSON')", "it ended with exit code 0"),
    ],
)
def test_a_crash(
    make_recipe: MakeRecipe, start: Callable[[str], Starts], source: str, message: str
) -> None:
    starts = start(source)
    recipe = make_recipe("llama")
    outcome = rehearse(recipe)
    assert (outcome.status, outcome.message) == ("not rehearsed", message)
    assert not outcome.settle(recipe).packs
    rehearse(recipe)
    assert starts.count == 2, "such an outcome is not kept"


def test_a_hang(
    make_recipe: MakeRecipe, start: Callable[[str], Starts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_SECONDS", 0.2)
    starts = start("import time; time.sleep(600)")
    outcome = rehearse(make_recipe("llama"))
    assert (outcome.status, outcome.message) == ("not rehearsed", "it took longer than 0.2 s")
    assert starts.children[0].returncode == -signal.SIGKILL


def test_a_rehearsal_that_nobody_waits_for_ends(
    make_recipe: MakeRecipe, start: Callable[[str], Starts]
) -> None:
    starts = start("import time; time.sleep(600)")
    with pytest.raises(RuntimeError), Rehearsal(make_recipe("llama")):
        raise RuntimeError
    assert starts.children[0].returncode == -signal.SIGKILL


def test_several_share_a_process(make_recipe: MakeRecipe, start: Callable[[str], Starts]) -> None:
    """Except after one that crashed."""
    starts = start(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    (target,) = json.loads(line)['recipe']['adapter']['targets']\n"
        "    if target == 'bad': sys.exit('it cannot')\n"
        f"    print({OUTCOME.to_json()!r}.replace('q_proj', target), flush=True)\n"
    )
    names = ("q_proj", "bad", "k_proj", "v_proj")
    recipes = {name: make_recipe("llama", adapter={"targets": [name]}) for name in names}
    first = rehearse_all({"q_proj": recipes["q_proj"]})
    assert (first, starts.count) == ({"q_proj": OUTCOME}, 1)
    outcomes = rehearse_all(recipes)
    assert starts.count == 3 and [one.returncode for one in starts.children[1:]] == [1, -9]
    crash = Outcome("not rehearsed", message="it ended with exit code 1: it cannot")
    assert outcomes.pop("bad") == crash
    assert {name: one.adapted for name, one in outcomes.items()} == {n: {n: 2} for n in outcomes}


@pytest.mark.long
def test_the_program(
    make_recipe: MakeRecipe, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, also where this process trains on an accelerator, which decomposes matrices."""
    monkeypatch.setenv(VARIABLE, "meta")
    recipe: Any = make_recipe(
        "llama", model={"base": str(tiny_model)}, adapter={"rank": 4, "init": "olora"}
    )
    outcome = rehearse(recipe)
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert outcome == Outcome("ok", isolation="documents", adapted=dict.fromkeys(names, 2))
