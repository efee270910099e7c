"""Methods: each kind has one class of facts and one objective; no other file depends on kinds."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from finray.training.config.method_facts import MethodSettings, ReferenceSettings
from finray.training.config.methods import METHODS, Method, title_of
from finray.training.config.recipe import Recipe
from finray.training.data.examples import EXAMPLES
from finray.training.engine.methods import OBJECTIVES

ROOT = Path(__file__).resolve().parents[3]
ALLOWED = {
    "training/config/methods.py",
    "training/engine/methods.py",
    # What other projects call the methods, and what they give each.
    *(
        f"cluster/starting/{name}.py"
        for name in ("axolotl", "command_line", "llama_factory", "llama_factory_v1", "trl")
    ),
}
CLASSES = {
    base.__name__
    for variant in METHODS.values()
    for base in variant.__mro__
    if issubclass(base, MethodSettings)
}


def test_the_union_and_the_registry_name_the_same_kinds() -> None:
    union = get_args(get_args(Method)[0])
    kinds = [get_args(variant.model_fields["kind"].annotation)[0] for variant in union]
    assert kinds == list(METHODS) == list(OBJECTIVES)


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.__name__)
def test_every_method_has_all_facts(method: type[MethodSettings]) -> None:
    assert method.title and method.measures and method.learns_from in EXAMPLES
    assert method.sequences_per_row == 1 or not method.packs
    watched = method.watched.name.removeprefix("eval_")
    assert watched in ("loss", *method.measures)
    assert ("reference_model" in method.model_fields) == issubclass(method, ReferenceSettings)


def test_titles() -> None:
    assert title_of("kto") == "Kahneman–Tversky optimisation"
    assert title_of("of-a-later-version") == "of-a-later-version"


def recipe(**method: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": "b"},
            "data": {"train": [{"path": "/a"}]},
            "method": method,
        }
    )


def test_tokens_that_are_trained() -> None:
    for method, expected in (
        (recipe(kind="sft"), False),
        (recipe(kind="sft", train_on="all"), True),
        (recipe(kind="pretrain"), True),
    ):
        assert method.method.trains_on_all is expected


REWARDS = [{"model": "m"}]


@pytest.mark.parametrize(
    ("method", "whole", "beside_an_adapter"),
    [
        ({"kind": "sft"}, False, False),
        ({"kind": "dpo"}, True, False),
        ({"kind": "dpo", "precompute_reference": True}, False, False),
        ({"kind": "dpo", "reference_model": "r"}, True, True),
        ({"kind": "kto", "reference_model": "r"}, True, True),
        ({"kind": "orpo"}, False, False),
        ({"kind": "grpo", "rewards": REWARDS}, False, False),
        ({"kind": "grpo", "rewards": REWARDS, "beta": 0.1}, True, False),
        ({"kind": "rloo", "rewards": REWARDS}, True, False),
        ({"kind": "rloo", "rewards": REWARDS, "beta": 0}, False, False),
    ],
)
def test_a_second_model_in_memory(
    method: dict[str, Any], whole: bool, beside_an_adapter: bool
) -> None:
    facts = recipe(**method).method
    assert facts.holds_second_model(trains_adapter=False) is whole
    assert facts.holds_second_model(trains_adapter=True) is beside_an_adapter


def test_facts_and_examples_need_no_torch() -> None:
    script = (
        "import sys\n"
        "import finray.training.data.examples, finray.training.inspection\n"
        "assert not {'torch', 'ray', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def lines_that_depend_on_kinds(source: str) -> list[int]:
    """Lines that test for a method's class, list two kinds, or compare with one."""
    return sorted(node.lineno for node in _nodes_that_depend_on_kinds(ast.parse(source)))


def _nodes_that_depend_on_kinds(tree: ast.AST) -> Iterator[Any]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name("isinstance" | "issubclass"), args=[_, classes]):
                tests_kind = any(map(_is_a_method_class, ast.walk(classes)))
            case ast.MatchClass():
                tests_kind = _is_a_method_class(node.cls)
            case ast.Dict():
                tests_kind = sum(map(_is_kind, node.keys)) > 1
            case ast.Set() | ast.Tuple() | ast.List():
                tests_kind = sum(map(_is_kind, node.elts)) > 1
            case ast.Compare():
                sides = [node.left, *node.comparators]
                tests_kind = any(map(_is_kind_attribute, sides)) and any(map(_has_kind, sides))
            case ast.Match():
                patterns = [case.pattern for case in node.cases]
                tests_kind = _is_kind_attribute(node.subject) and any(map(_has_kind, patterns))
            case _:
                tests_kind = False
        if tests_kind:
            yield node


def _is_a_method_class(node: ast.AST) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
    return name in CLASSES


def _is_kind(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value in METHODS


def _has_kind(node: ast.AST) -> bool:
    return any(map(_is_kind, ast.walk(node)))


def _is_kind_attribute(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "kind"


@pytest.mark.long
def test_no_other_file_depends_on_kinds() -> None:
    for floor in ("training", "tuning", "cluster"):
        for path in (ROOT / floor).rglob("*.py"):
            name = str(path.relative_to(ROOT))
            if name not in ALLOWED:
                lines = lines_that_depend_on_kinds(path.read_text(encoding="utf-8"))
                assert not lines, f"{name}:{lines[0]}: ask the facts of the method's settings"


PLANTED = """\
if isinstance(recipe.method, DpoMethod | methods.KtoMethod): pass
if isinstance(method, (OnlineMethod, Other)): pass
if isinstance(method, PairSettings): pass
TITLES = {"sft": "a", "pretrain": "b"}
PAIRS = {"dpo", "cpo"}
PAIRS = ("dpo", "cpo")
PAIRS = ["dpo", "cpo"]
if recipe.method.kind == "kto": pass
x = 1 if method.kind in ("kto",) else 2
match method.kind:
    case "grpo" | "x": pass
match method:
    case GrpoMethod(): pass
"""
FINE = """\
if isinstance(adapter, LoraAdapter) or adapter.kind == "lora": pass
LOSSES = {"sigmoid": 1, "sft": 2}
if loss == "kto" or "sft" in losses: pass
match settings.loss:
    case "grpo": pass
if isinstance(reward, FunctionReward) and method.kind in kinds: pass
method = cast(DpoMethod, recipe.method)
"""


def test_each_dependence_on_kinds_is_detected() -> None:
    assert lines_that_depend_on_kinds(PLANTED) == [*range(1, 11), 13]
    assert lines_that_depend_on_kinds(FINE) == []
