"""A sweep is checked before anything starts: one message, with file, line and key."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finray.cluster.api.sweeps import check_sweep
from finray.training.common.errors import InputError
from finray.tuning.default_search import suggested_learning_rate
from finray.tuning.plan import Plan, make_plan
from finray.tuning.sweep import load_sweep

RATE = {"optim.learning_rate": {"log_uniform": [1e-5, 1e-3]}}
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path, tiny_model: Path) -> MakePlan:
    """A function that plans a sweep of a small recipe; keyword arguments change the sweep."""

    def make(recipe: dict[str, Any] | None = None, **settings: Any) -> Plan:
        base: dict[str, Any] = {
            "model": {"base": str(tiny_model)},
            "adapter": {"rank": 4},
            "data": {"train": [{"path": "rows.jsonl"}], "holdout": 0.1},
            "optim": {"batch_size": 8},
            **(recipe or {}),
        }
        path = tmp_path / "sweep.yaml"
        values = {"name": "sweep", "search": RATE, **settings, "recipe": base}
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return make_plan(load_sweep(path))

    return make


def test_trials_share_data_that_is_prepared_ahead(plan: MakePlan) -> None:
    streaming = {
        "data": {"train": [{"path": "rows.jsonl"}], "holdout": 0.1, "prepare": "streaming"},
        "optim": {"batch_size": 8, "max_steps": 9},
    }
    with pytest.raises(InputError, match=r"sweep.yaml:\d+: recipe: data.prepare streaming"):
        plan(streaming)
    searched = {**RATE, "data.prepare": {"choice": ["ahead", "streaming"]}}
    with pytest.raises(InputError, match="streaming prepares the data of one run"):
        plan({"optim": {"batch_size": 8, "max_steps": 9}}, search=searched)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"search": {"optim.learning_rat": {"choice": [1]}}},
            r"sweep.yaml:3: search.optim.learning_rat: unknown key; did you mean 'learning_rate'",
        ),
        (
            {"search": {"scale.workers": {"choice": [1, 2]}}},
            "scale must be the same for all",
        ),
        (
            {"search": {"adapter.rank": {"choice": []}}},
            "adapter.rank.choice: expected a list of at least 1",
        ),
        ({"search": {"adapter.rank": {"int_uniform": [8, 4]}}}, r"bounds are reversed.*\[8, 4\]"),
        (
            {"search": {"adapter.rank": {"uniform": [4, 8]}}},
            "never makes a valid recipe.*whole number",
        ),
        ({"search": {"adapter.rank": {"choice": [4, "x"]}}}, "'x' never makes a valid recipe"),
        ({"search": {"adapter.dropout": {"uniform": [0, 1]}}}, "never makes a valid .*below 1"),
        ({"search": {"optim.learning_rate": {"log_uniform": [0, 1]}}}, "must be above 0"),
        ({"search": {"adapter.rank": {"choice": [4], "uniform": [1, 2]}}}, "found choice and unif"),
        (
            {"search": {"adapter.rank": {"choice": [4], "when": {"seed": 1}}}},
            "depends on seed, which is not searched",
        ),
        ({"search": {"data.holdout": {"uniform": [0.1, 0.2]}}}, "prepared before the first trial"),
        ({"objective": "eval_los"}, "never reports 'eval_los'; it reports eval_loss"),
        ({"objective": "exact_match"}, "exact_match needs eval.samples"),
        ({"objective": ["loss", "loss"]}, "contains the same metric twice"),
        (
            {"objective": "adapter_bytes", "pruning": {"kind": "asha"}},
            "only known at a trial",
        ),
        ({"objective": ["loss", "eval_loss"], "pruning": {"kind": "median"}}, "needs a single obj"),
        ({"sampler": "grid"}, "grid needs a finite number .* optim.learning_rate has a continuous"),
        ({"points": [{"adapter.rank": 4}]}, "points.0: adapter.rank is not searched"),
        ({"points": [{"optim.learning_rate": 1}]}, "points.0: .*1 is not in the search space"),
        (
            {"search": {"adapter.rank": {"choice": [4], "at_alpha": 32}}},
            "at_alpha cannot be combined with choice",
        ),
        (
            {"search": {"optim.weight_decay": {"log_uniform": [0.01, 0.1], "at_alpha": 32}}},
            "at_alpha belongs to optim.learning_rate",
        ),
        ({"trails": 3}, "trails: unknown key; did you mean 'trials'"),
        ({"time_budget": "soon"}, "time_budget"),
        ({"name": "prepared"}, "name: .*finray keeps prepared data"),
    ],
)
def test_bad_sweeps(plan: MakePlan, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        plan(**settings)
    assert "sweep.yaml:" in str(error.value)


def test_an_eval_objective_needs_held_out_data(plan: MakePlan) -> None:
    with pytest.raises(InputError, match=r"need data\.eval or data\.holdout"):
        plan({"data": {"train": [{"path": "rows.jsonl"}]}})


def test_impossible_combinations_are_excluded_with_their_reason(plan: MakePlan) -> None:
    made = plan(
        search={
            "optim.batch_size": {"choice": [2, 16]},
            "optim.micro_batch_size": {"choice": [2, 4]},
        }
    )
    assert made.excluded_count == 1
    assert made.excluded[0].settings == {"optim.batch_size": 2, "optim.micro_batch_size": 4}
    assert "larger than optim.batch_size 2" in made.excluded[0].reason


def test_no_feasible_trial(plan: MakePlan) -> None:
    with pytest.raises(InputError, match=r"2 never makes a valid recipe.*larger than"):
        plan(search={"optim.batch_size": {"choice": [2]}})


def test_conditional_keys_and_computed_ones(plan: MakePlan) -> None:
    made = plan(
        search={
            "optim.beta2": {"choice": [0.9, 0.99], "when": {"optim.schedule": "linear"}},
            "optim.schedule": {"choice": ["cosine", "linear"]},
            "adapter.alpha": {"times": 2, "of": "adapter.rank"},
            "adapter.rank": {"choice": [2, 8]},
        }
    )
    every = made.combinations.every_setting()
    assert every is not None and len(every) == 2 * (1 + 2)
    for settings in every:
        assert ("optim.beta2" in settings) == (settings["optim.schedule"] == "linear")
        recipe = made.space.recipe(settings)
        assert recipe.adapter is not None
        assert recipe.adapter.alpha == 2 * recipe.adapter.rank == 2 * settings["adapter.rank"]


def test_whole_sections_are_choices(plan: MakePlan) -> None:
    made = plan(search={"adapter": {"choice": [None, {"rank": 2}]}})
    recipes = [made.space.recipe(settings) for settings in made.combinations.every_setting() or []]
    assert [recipe.adapter and recipe.adapter.rank for recipe in recipes] == [None, 2]


@pytest.mark.parametrize("own", [["normalise"], ["normalise", {"kind": "deduplicate"}]])
def test_the_first_trial_has_the_recipes_own_choice_in_any_form(
    plan: MakePlan, own: list[Any]
) -> None:
    choices = [[], ["normalise"], ["normalise", "deduplicate"]]
    made = plan(
        {"data": {"train": ["rows.jsonl"], "holdout": 0.1, "curate": own}},
        search={"data.curate": {"choice": choices}},
    )
    assert made.points == [{"data.curate": choices[len(own)]}]


def test_code_that_only_some_trials_have_is_tried_first(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "rows.py").write_text("import nothing_here\ndef good(row): ...\n")
    stages = [[], [{"kind": "keep", "with": "rows.py:good"}]]
    plan(search={"data.curate": {"choice": stages}}, storage=str(tmp_path / "runs"))
    with pytest.raises(
        InputError, match=r"sweep\.yaml:\d+: data\.curate\.0\.with.* cannot be imported"
    ):
        check_sweep(tmp_path / "sweep.yaml")


def test_another_function_comes_with_its_own_text(plan: MakePlan, tmp_path: Path) -> None:
    for name in ("a", "b"):
        text = f"def good(row):\n    return row['x'] == {name!r}\n"
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    stage = {"kind": "keep", "with": "a.py:good"}
    made = plan(
        {"data": {"train": ["rows.jsonl"], "holdout": 0.1, "curate": [stage]}},
        search={"data.curate.0.with.file": {"choice": ["a.py:good", "b.py:good"]}},
    )
    functions = [
        recipe.data.curate[0].function  # type: ignore[union-attr]
        for recipe in made.data_recipes().values()
    ]
    assert [function.load()({"x": "b"}) for function in functions if function] == [False, True]


@pytest.mark.parametrize("whole", [False, True])
def test_a_sweep_uses_one_text_of_each_file(plan: MakePlan, tmp_path: Path, whole: bool) -> None:
    """Also that of the recipe, and for values that name the file inside a section."""
    names = ["a.py:good", "./b.py:good"]
    (tmp_path / "a.py").write_text("def good(row):\n    return 'first'\n", encoding="utf-8")
    (tmp_path / "b.py").write_text("def good(row):\n    return 'first'\n", encoding="utf-8")
    stages: list[Any] = [[{"kind": "keep", "with": name}] for name in names]
    made = plan(
        {"data": {"train": ["rows.jsonl"], "holdout": 0.1, "curate": stages[0]}},
        search={
            "data.curate" if whole else "data.curate.0.with.file": {
                "choice": stages if whole else names
            }
        },
    )

    def said() -> list[Any]:
        functions = [recipe.data.curate[0].function for recipe in made.data_recipes().values()]  # type: ignore[union-attr]
        return [function.load()({}) for function in functions if function]

    (tmp_path / "a.py").write_text("not Python", encoding="utf-8")
    assert said() == ["first", "first"]
    (tmp_path / "b.py").unlink()
    assert said() == ["first", "first"]


def test_a_sweep_uses_one_text_of_each_chat_template(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text("{{ 'first' }}", encoding="utf-8")
    choice = {"choice": ["a.jinja", "chatml"]}
    made = plan(
        {"data": {"train": ["rows.jsonl"], "holdout": 0.1}}, search={"data.chat_template": choice}
    )
    (tmp_path / "a.jinja").write_text("{{ 'second' }}", encoding="utf-8")
    templates = [made.space.recipe({"data.chat_template": name}) for name in choice["choice"]]
    assert [each.data.chat_template for each in templates] == ["{{ 'first' }}", "chatml"]


def test_the_default_space_lies_around_the_rule(plan: MakePlan) -> None:
    made = plan(search="default")
    # 5e-5 * 10 * (2000 / 32) ** 0.78, at alpha 32
    assert suggested_learning_rate(made.recipe) == pytest.approx(0.0126, rel=0.05)
    first = made.points[0]
    # The rank that the recipe has, with alpha tied to it: 8, a fourth of 32.
    assert first["adapter.alpha"] == 2 * first["adapter.rank"] == 8
    assert first["optim.learning_rate"] == pytest.approx(2 * suggested_learning_rate(made.recipe))
    low, high = made.space["optim.learning_rate"].bounds
    assert high / low == pytest.approx(100, rel=0.05)
    assert "adapter.alpha" not in made.space.searched


@pytest.mark.parametrize(
    "search", ["default", {"optim.learning_rate": {"log_uniform": [1e-7, 1e-1]}}]
)
def test_the_rule_of_thumb_depends_on_alpha(plan: MakePlan, search: Any) -> None:
    """Adapters with the same rank and the same scaling get the same rate."""

    def rule(**adapter: Any) -> float:
        recipe = {"adapter": adapter, "method": {"kind": "dpo"}}
        first = plan(recipe, search=search).points[0]
        return float(first["optim.learning_rate"])

    # The default space ties alpha to the rank.
    assert rule(rank=64, alpha=128) == pytest.approx(rule(rank=16, alpha=32) / 2)
    assert rule(rank=16, alpha=32, rslora=True) == pytest.approx(rule(rank=64, alpha=128))


def test_the_first_guesses_of_the_default_space(plan: MakePlan) -> None:
    recipe = {"adapter": {"rank": 16, "alpha": 32}}
    guess = {"adapter.rank": 64}
    made = plan(recipe, search="default", points=[guess])
    rule = suggested_learning_rate(made.recipe)
    adapter = {"adapter.rank": 16, "adapter.rslora": False, "adapter.alpha": 32.0}
    assert made.points[0] == pytest.approx({**adapter, "optim.learning_rate": rule})
    assert made.points[1]["adapter.rank"] == 64
    # The other kind of adapter; its alpha of 32 counts eight times, the root of its rank.
    other = {"adapter.rank": 64, "adapter.rslora": True}
    around = (10**0.5, 10**-0.5)
    for point, times in zip(made.points[2::2], (1, *around), strict=True):
        rate = times * rule / 8**0.5
        assert point == pytest.approx({**other, "optim.learning_rate": rate})
    for point, times in zip(made.points[3::2], around, strict=True):
        assert point == pytest.approx({**adapter, "optim.learning_rate": times * rule})
    assert len(plan(recipe, search="default", trials=2).points) == 2
    assert len(plan(recipe, search=RATE).points) == 1
    full = plan({"adapter": None}, search="default").points
    assert [
        point["optim.learning_rate"] / suggested_learning_rate(made.recipe) for point in full
    ] == (pytest.approx([0.1, 10**-0.5, 10**-1.5], rel=0.05))


class Drawn:
    """An Optuna trial with given values."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return self.values[name.rpartition(".")[2]]

    def suggest_float(self, name: str, low: float, high: float, **_: Any) -> float:
        assert name == "optim.learning_rate at alpha 32" and low <= self.values["rate"] <= high
        return float(self.values["rate"])

    suggest_int = suggest_float


@pytest.mark.parametrize(
    ("rank", "rslora", "factor"), [(16, False, 1.0), (64, False, 0.5), (16, True, 0.5)]
)
def test_a_rate_moves_with_the_adapters_alpha(
    plan: MakePlan, rank: int, rslora: bool, factor: float
) -> None:
    space = plan({"adapter": {"rank": 16, "alpha": 32}}, search="default").space
    settings = space.suggest(Drawn(rate=0.01, rank=rank, rslora=rslora))
    assert settings["optim.learning_rate"] == pytest.approx(0.01 * factor)
    labels = space.labels(settings)
    assert labels.pop("optim.learning_rate at alpha 32") == pytest.approx(0.01)
    assert labels == {"adapter.rank": rank, "adapter.rslora": rslora}


def test_a_guess_of_a_rate_is_the_recipes_rate(plan: MakePlan) -> None:
    settings = {"recipe": {"adapter": {"rank": 16, "alpha": 32}}, "search": "default"}
    high = plan(**settings).space["optim.learning_rate"].bounds[1]
    # At rank 64, alpha is 128, and the range ends at half the rate.
    guess = {"adapter.rank": 64, "optim.learning_rate": high / 2.1}
    made = plan(**settings, points=[guess])
    assert made.points[1]["optim.learning_rate"] == guess["optim.learning_rate"]
    with pytest.raises(InputError, match="not in the search space"):
        plan(**settings, points=[{**guess, "optim.learning_rate": high / 1.9}])
    with pytest.raises(InputError, match="'fast' is not in the search space"):
        plan(**settings, points=[{"optim.learning_rate": "fast"}])


def test_rates_at_an_alpha_need_an_adapter(plan: MakePlan) -> None:
    rate = {"optim.learning_rate": {"log_uniform": [1e-5, 1e-3], "at_alpha": 32}}
    with pytest.raises(InputError, match=r"sweep.yaml:3.* needs a base recipe with a section ad"):
        plan({"adapter": None}, search=rate)
    for key, text, kind in (("adapter.rank", "8", "a num"), ("adapter.rslora", "true", "true or")):
        with pytest.raises(InputError, match=rf"search.{key}: expected {kind}.*found '{text}'"):
            plan(search={**rate, key: {"choice": [text]}})


def test_full_fine_tuning_learns_ten_times_slower(plan: MakePlan) -> None:
    lora, full = plan(search="default"), plan({"adapter": None}, search="default")
    ratio = suggested_learning_rate(lora.recipe) / suggested_learning_rate(full.recipe)
    assert ratio == pytest.approx(10, rel=0.05)
    assert full.space.searched == ["optim.learning_rate"]


def test_points_come_after_the_rule_and_keep_the_recipe_elsewhere(plan: MakePlan) -> None:
    made = plan(
        search={**RATE, "adapter.rank": {"choice": [2, 4, 8]}},
        points=[{"optim.learning_rate": 5e-4}],
    )
    assert made.points[1] == {"optim.learning_rate": 5e-4, "adapter.rank": 4}


def test_recipes_share_data_unless_its_settings_differ(plan: MakePlan) -> None:
    made = plan(search={**RATE, "data.max_length": {"choice": [64, 128]}})
    keys = {made.combinations.data_key(settings) for settings in made.combinations.data_settings()}
    assert len(keys) == 2
    assert len(plan().combinations.data_settings()) == 1


def test_no_data_is_prepared_for_impossible_combinations(plan: MakePlan) -> None:
    mixes = {"choice": [None, {"temperature": 0.5}]}
    made = plan(search={"data.mix": mixes, "data.train.0.weight": {"choice": [1, 2]}})
    assert made.excluded_count == 1
    pairs = [(r.data.mix is None, r.data.train[0].weight) for r in made.data_recipes().values()]
    assert pairs == [(True, 1.0), (True, 2.0), (False, 1.0)]


def test_data_is_prepared_for_combinations_that_need_other_values_than_the_recipes(
    plan: MakePlan,
) -> None:
    lengths, sizes = {"choice": [512, 4096]}, {"choice": [1024, 8192]}
    made = plan(
        {
            "data": {"train": ["rows.jsonl"], "holdout": 0.1, "max_length": 512},
            "optim": {"batch_size": 8, "micro_batch_tokens": 1024},
        },
        search={"data.max_length": lengths, "optim.micro_batch_tokens": sizes},
    )
    assert made.excluded_count == 1
    pairs = [
        (recipe.data.max_length, recipe.optim.micro_batch_tokens)
        for recipe in made.data_recipes().values()
    ]
    assert pairs == [(512, 1024), (4096, 8192)]


def test_data_that_depends_on_other_keys_is_prepared_for_all_their_values(plan: MakePlan) -> None:
    ranks = {"adapter.rank": {"choice": [2, 4, 8]}}
    when = {"choice": [64, 128], "when": {"adapter.rank": 8}}
    for length, lengths in ((when, 3), ({"times": 16, "of": "adapter.rank"}, 3)):
        made = plan(search={**ranks, "data.max_length": length})
        recipes = made.data_recipes()
        assert len({recipe.data.max_length for recipe in recipes.values()}) == lengths
        for settings in made.combinations.every_setting() or []:
            recipe = recipes[made.combinations.data_key(settings)]
            assert recipe.data.max_length == made.space.recipe(settings).data.max_length
    rate = {**RATE, "data.max_length": {"choice": [64], "when": {"optim.learning_rate": 1e-4}}}
    with pytest.raises(InputError, match=r"max_length: .*finite, also of optim"):
        plan(search=rate)


def test_keys_computed_from_the_rate_follow_the_rule(plan: MakePlan) -> None:
    decay = {"times": 10, "of": "optim.learning_rate"}
    search = {"optim.learning_rate": {"log_uniform": [1e-5, 0.05]}, "optim.weight_decay": decay}
    first = plan(search=search).points[0]
    assert first["optim.weight_decay"] == 10 * first["optim.learning_rate"]


def test_the_rule_is_that_of_the_chosen_adapter(plan: MakePlan) -> None:
    search = {
        "optim.learning_rate": {"log_uniform": [1e-5, 1e-1]},
        "adapter": {"choice": [None, {"rank": 4, "alpha": 128}]},
    }
    space = plan(search=search).space
    lora = space.rule_of_thumb({"adapter": {"rank": 4, "alpha": 128}})
    full = space.rule_of_thumb({"adapter": None})
    ratio = lora["optim.learning_rate"] / full["optim.learning_rate"]
    assert ratio == pytest.approx(10 / 2, rel=0.05), "ten times, and half at four times alpha 32"


def test_the_recipes_own_rate_without_a_width(plan: MakePlan, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"n_embd": 64}', encoding="utf-8")
    adapter = {"rank": 16, "alpha": 128}
    model = {"base": str(tmp_path)}
    recipe = {"model": model, "adapter": adapter, "optim": {"learning_rate": 1e-3}}
    first = plan(recipe, search="default").points[0]
    # Alpha is tied to the rank, and a fourth of the recipe's: twice its rate.
    assert first["adapter.alpha"] == 32
    assert first["optim.learning_rate"] == pytest.approx(2e-3)
    free = plan(recipe, search={"optim.learning_rate": {"log_uniform": [1e-5, 1e-1]}}).points[0]
    assert free["optim.learning_rate"] == pytest.approx(1e-3)


def test_numbers_need_no_point(tmp_path: Path, plan: MakePlan) -> None:
    plan(points=[{"optim.learning_rate": 1e-4}])
    path = tmp_path / "sweep.yaml"
    text = path.read_text(encoding="utf-8")
    assert "0.0001" in text
    path.write_text(text.replace("0.0001", "1e-4"), encoding="utf-8")
    assert make_plan(load_sweep(path)).points[1] == {"optim.learning_rate": 1e-4}


def test_time_budget_as_text(plan: MakePlan) -> None:
    assert plan(time_budget="1.5h").sweep.time_budget == 5400
    assert plan(time_budget=90).sweep.time_budget == 90


def test_a_sweep_is_checked_without_ray_and_torch() -> None:
    """Ray takes its token and settings from the environment when it is imported."""
    script = (
        "import sys, finray.cluster.cli.tune, finray.tuning.resume, finray.tuning.plan\n"
        "assert not {'ray', 'torch', 'optuna'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
