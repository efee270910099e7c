"""Short forms of sections equal their full forms, everywhere."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finray.training.common.errors import InputError
from finray.training.config.methods import METHODS
from finray.training.config.recipe import Recipe, load_recipe
from finray.tuning.sweep import load_sweep

SHORT: dict[str, Any] = {
    "name": "x",
    "model": "o/m",
    "adapter": "dora",
    "method": "dpo",
    "data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 2}], "eval": "c.jsonl"},
}
FULL: dict[str, Any] = {
    "name": "x",
    "model": {"base": "o/m"},
    "adapter": {"kind": "lora", "dora": True},
    "method": {"kind": "dpo"},
    "data": {
        "train": [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 2}],
        "eval": [{"path": "c.jsonl"}],
    },
}


def write(folder: Path, values: Any) -> Path:
    path = folder / "file.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_short_and_full_forms_are_equal(tmp_path: Path) -> None:
    short, full = load_recipe(write(tmp_path, SHORT)), load_recipe(write(tmp_path, FULL))
    assert short == full == Recipe.model_validate(full.model_dump(mode="json"))
    # What a run writes names every key.
    assert short.model_dump(mode="json") == full.model_dump(mode="json")
    assert short.model_dump(mode="json", exclude_unset=True) == full.model_dump(
        mode="json", exclude_unset=True
    )
    assert Recipe.model_validate(SHORT) == Recipe.model_validate(FULL)


def test_keys_inside_a_short_form_can_be_set(tmp_path: Path) -> None:
    path = write(tmp_path, SHORT)
    overrides = ["model.revision=main", "adapter.rank=4", "method.beta=0.2"]
    recipe = load_recipe(path, [*overrides, "data.train.1.weight=3", "data.eval.0.format=text"])
    assert (recipe.model.base, recipe.model.revision) == ("o/m", "main")
    assert recipe.adapter is not None and recipe.adapter.dora and recipe.adapter.rank == 4
    assert recipe.method.model_dump()["beta"] == 0.2
    assert recipe.data.train[1].weight == 3 and recipe.data.eval[0].format == "text"
    recipe = load_recipe(
        write(tmp_path, FULL), ["model=p/n", "adapter=lora", "model.dtype=float32"]
    )
    assert (recipe.model.base, recipe.model.dtype) == ("p/n", "float32")
    assert recipe.adapter is not None and not recipe.adapter.dora
    recipe = load_recipe(path, ["data.train=d.jsonl", "method=sft", "adapter=null"])
    assert [source.path for source in recipe.data.train] == [str(tmp_path / "d.jsonl")]
    assert recipe.method.kind == "sft" and recipe.adapter is None


def test_places_of_short_forms(tmp_path: Path) -> None:
    path = write(tmp_path, SHORT)
    lines = path.read_text(encoding="utf-8").splitlines()
    recipe = load_recipe(path, ["method=sft"])
    for key, line in (("data.train.1", "  - path: b.jsonl"), ("data.eval.0", "  eval: c.jsonl")):
        assert recipe.located(f"{key}: gone") == f"{path}:{lines.index(line) + 1}: {key}: gone"
    assert recipe.located("model.base: gone") == f"{path}:2: model.base: gone"
    assert recipe.located("method.kind: no") == "--set method=sft: method.kind: no"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "adapter=qlora",
            "adapter: expected one of 'lora', 'dora', a mapping with keys such as ki",
        ),
        ("method=dop", "method.kind: expected one of 'sft', 'pretrain', 'dpo', "),
        ("model=3", "model: expected text or a mapping with keys such as base, "),
        ("data.train=3", "data.train: expected text, a mapping with keys such as path, "),
        ("data.train=[a, 3]", "data.train.1: expected a mapping with keys such as path, "),
        ("model.revison=x", "model.revison: unknown key; did you mean 'revision'?"),
    ],
)
def test_wrong_short_forms(tmp_path: Path, override: str, message: str) -> None:
    assert refusal(write(tmp_path, SHORT), override).startswith(f"--set {override}: {message}")


def test_a_sweeps_recipe_and_search_take_short_forms(tmp_path: Path) -> None:
    data = {**SHORT["data"], "eval": "c.jsonl"}
    search = {"adapter": {"choice": ["lora", "dora"]}, "adapter.rank": {"choice": [4, 8]}}
    values = {"name": "s", "recipe": {**SHORT, "data": data}, "search": search}
    values["set"] = {"model": "p/n", "model.dtype": "float32"}
    loaded = load_sweep(write(tmp_path, values), (), ("method.beta=0.3",))
    assert (loaded.recipe.model.base, loaded.recipe.model.dtype) == ("p/n", "float32")
    assert loaded.recipe.method.model_dump()["beta"] == 0.3
    from finray.tuning.space import Space

    space = Space(dict(loaded.sweep.search), loaded.recipe, tmp_path, str)  # type: ignore[arg-type]
    recipes = [
        space.recipe({"adapter": kind, "adapter.rank": 4 + 4 * (kind == "dora")})
        for kind in ("lora", "dora", "lora")
    ]
    adapters = [recipe.adapter for recipe in recipes if recipe.adapter is not None]
    assert [(adapter.dora, adapter.rank) for adapter in adapters] == [
        (False, 4),
        (True, 8),
        (False, 4),
    ]


def test_the_schema_shows_short_forms() -> None:
    schema = Recipe.model_json_schema()
    properties = schema["properties"]
    kinds = [option["type"] for option in properties["model"]["anyOf"] if "type" in option]
    assert kinds == ["string"]
    assert {"lora", "dora"} == set(properties["adapter"]["anyOf"][0]["enum"])
    assert set(METHODS) == set(properties["method"]["anyOf"][0]["enum"])
    train = schema["$defs"]["DataSettings"]["properties"]["train"]["anyOf"]
    (several,) = (option for option in train if option.get("type") == "array")
    assert {"type": "string"} in train and several["minItems"] == 1
    assert {"type": "string"} in several["items"]["anyOf"]
