"""Every recipe and sweep in recipes/: valid, true in its comments, and fit to train its model.

A recipe's model is replaced by a small random one of the same architecture, and its data by rows of
the shape that its comments show.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
import yaml
from support.cases import mostly_slow
from support.finished_run import finished_run
from support.manifests import SCHEMAS, check_ray, recipe_text
from support.real_models import CONFIGS, make_stand_in, write_config

from finray.cluster.api.outlook import examine
from finray.cluster.cli.commands import COMMANDS
from finray.cluster.gpus import Gpu, amount
from finray.cluster.jobs.staging import RECIPE_FILE, stage
from finray.cluster.kubernetes.render import Target, render
from finray.cluster.memory_fit import judge
from finray.training.common.storage import Folder
from finray.training.config.recipe import Recipe, load_recipe, recipe_from_dict
from finray.training.config.sections import OptimSettings
from finray.training.config.user_code import try_import
from finray.training.data.shown_rows import show_rows
from finray.training.launch.in_process import InProcessLauncher
from finray.training.models.memory_estimate import MemoryEstimate, Sizes, estimate, sizes_of
from finray.training.run import train
from finray.tuning.default_search import suggested_learning_rate
from finray.tuning.plan import Plan, make_plan
from finray.tuning.sweep import load_sweep

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

FOLDER = Path(__file__).resolve().parents[3] / "recipes"
ROWS = 240
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
"""Those of real models."""


def name_of(path: Path) -> str:
    return path.relative_to(FOLDER).as_posix()


def values_of(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


FILES = {name_of(path): values_of(path) for path in sorted(FOLDER.rglob("*.yaml"))}
SWEEPS = [name for name, values in FILES.items() if "recipe" in values]
TRAINED = [name for name in FILES if name not in SWEEPS]
REAL = [name for name in TRAINED if not name.startswith("quickstart/")]
"""Recipes whose model is on the hub, and whose data is the reader's."""
COMMAND_OF = dict(
    reversed(words)
    for words in re.findall(
        r"`finray ([a-z0-9 ]+) recipes/(\S+\.yaml)", (FOLDER / "README.md").read_text("utf-8")
    )
)


class Tried:
    """Makes the settings with which a recipe can be tried here.

    Args:
        folder: an empty folder.
        tokenizer: a model folder whose tokenizer the stand-ins get.
    """

    def __init__(self, folder: Path, tokenizer: Path) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._models: dict[str, str] = {}
        self.storage = folder / "runs"

    def swaps(self, name: str) -> list[str]:
        """Overrides that replace what is not on this machine: model, data, earlier runs."""
        values, folder = FILES[name], (FOLDER / name).parent
        base = self._model(values["model"]["base"], folder)
        self._make_earlier_runs(values, Path(base))
        swaps = [f"storage={self.storage}", f"model.base={base}"]
        if "tools" in example_row(FOLDER / name):  # the stand-in's template has none
            swaps.append(f"data.chat_template={TEMPLATES / 'qwen3.jinja'}")
        for split in ("train", "eval"):
            for index, source in enumerate(sources_of(values, split)):
                if "dataset" in source:
                    swaps.append(f"data.{split}.{index}.dataset={self.data_set(name)}")
                elif "path" in source and not (folder / source["path"]).is_file():
                    swaps.append(f"data.{split}.{index}.path={self.rows(name)}")
        return swaps

    def data_set(self, name: str) -> Path:
        """A folder with the splits of the data set that a recipe reads, and rows like its own."""
        rows = self.rows(name)
        sources = [one for split in ("train", "eval") for one in sources_of(FILES[name], split)]
        subset = next(one.get("subset", "default") for one in sources)
        splits = {one.get("split", "train").partition("[")[0] for one in sources}
        config = {
            "config_name": subset,
            "data_files": [{"split": split, "path": rows.name} for split in sorted(splits)],
        }
        folder = self._folder / "sets" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / rows.name).write_bytes(rows.read_bytes())
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [config]})}---\n")
        return folder

    def rows(self, name: str) -> Path:
        """A file of rows like the one in the recipe's comments."""
        row = json.dumps(example_row(FOLDER / name), ensure_ascii=False)
        path = self._folder / f"{name.replace('/', '-')}.jsonl"
        lines = [row.replace("…", f"word number {number}") for number in range(ROWS)]
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    def _model(self, base: str, folder: Path) -> str:
        if base not in CONFIGS:  # a folder; the quickstart's `skeleton` is made by a script
            return str(folder / (base if (folder / base).is_dir() else "base"))
        if base not in self._models:
            made = make_stand_in(CONFIGS[base], self._tokenizer, self._folder / base)
            self._models[base] = str(made)
        return self._models[base]

    def _make_earlier_runs(self, values: dict[str, Any], base: Path) -> None:
        rewards = values.get("method", {}).get("rewards", [])
        runs = {reward["run"]: "score" for reward in rewards if "run" in reward}
        if (adapter := values["model"].get("adapter")) is not None:
            runs[adapter] = "adapter"
        for run, what in runs.items():
            if not (self.storage / run).exists():
                finished_run(self._folder, base, what, run_name=run)


def sources_of(values: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """The sources of a split, of which a single one may stand without a list."""
    sources = values["data"].get(split, [])
    return [sources] if isinstance(sources, dict) else sources


def example_row(path: Path) -> dict[str, Any]:
    """The row that a recipe's comments show; plain text where they show none."""
    text = path.read_text(encoding="utf-8")
    shown = re.search(r"^# Rows of .*:\n((?:#   .*\n)+)", text, re.MULTILINE)
    row: dict[str, Any] = json.loads(shown[1].replace("#", "")) if shown else {"text": "…"}
    return row


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Tried:
    return Tried(tmp_path_factory.mktemp("tried"), tiny_model)


def load(name: str, tried: Tried, *changes: str) -> Recipe:
    return load_recipe(FOLDER / name, (*tried.swaps(name), *changes))


# every recipe


_FEW = OptimSettings(batch_size=1, micro_batch_size=1)


@pytest.mark.long
@pytest.mark.parametrize("name", TRAINED)
def test_check_calls_it_good(name: str, tried: Tried) -> None:
    recipe = load(name, tried)
    if recipe.packs:  # the few rows here fill fewer sequences than a real step takes
        recipe = recipe.model_copy(update={"optim": _FEW})
    outlook = examine(recipe, fresh=True)
    try_import(recipe)
    assert all(source["rows"] and source["is_exact"] for source in outlook["sources"])
    assert outlook["steps"] > 0 and outlook["parameters"]["trainable"] > 0


def kind_of(name: str) -> tuple[Any, ...]:
    """What distinguishes a recipe's steps from those of others, on one CPU."""
    values = FILES[name]
    model, method = values["model"], values.get("method", {"kind": "sft"})
    return method["kind"], model.get("quantize"), "adapter" in values


KINDS = {kind_of(name): name for name in reversed(REAL)}


def train_two_steps(name: str, tried: Tried, storage: Path, *changes: str) -> Path:
    """The run's folder after two steps in this process."""
    small = (
        *("scale.workers=0", "scale.strategy=auto", "data.max_length=96", "data.holdout=0.1"),
        *("data.eval=[]", "data.overlong=truncate_left"),
        *("optim.epochs=null", "optim.max_steps=2", "optim.batch_size=8"),
        *("optim.micro_batch_size=4", "eval.every_steps=null", "eval.samples=0"),
        *("log.every_steps=1", "log.to=[]", f"storage={storage}"),
    )
    recipe = load(name, tried, *small, *changes)
    assert train(recipe, InProcessLauncher())["status"] == "finished"
    return storage / recipe.name


def check_steps(run: Path) -> dict[str, float]:
    """Losses are finite, and the result is there; returns the last step's metrics."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, last = (row for row in map(json.loads, lines) if "loss" in row)
    assert math.isfinite(first["loss"]) and math.isfinite(last["loss"])
    result = "adapter/adapter_model" if (run / "adapter").is_dir() else "model/model"
    assert (run / f"{result}.safetensors").is_file()
    return dict(last)


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    mostly_slow(
        [name for kind, name in KINDS.items() if kind[0] != "grpo"],
        ("models/llama-3.1-8b-qlora.yaml", "models/qwen3-4b-dpo.yaml"),
    ),
)
def test_two_steps(name: str, tried: Tried, tmp_path: Path) -> None:
    check_steps(train_two_steps(name, tried, tmp_path))


@pytest.mark.slow
def test_two_steps_of_the_chain(tried: Tried, tmp_path: Path) -> None:
    """GRPO with the scores of the reward model that the recipe before it trains."""
    check_steps(train_two_steps("models/qwen3-4b-reward.yaml", tried, tmp_path))
    sampled = ("method.max_completion=16", "method.rollout_batch_size=8")
    run = train_two_steps("models/qwen3-4b-grpo.yaml", tried, tmp_path, *sampled)
    measured = check_steps(run)
    assert measured["reward/qwen3-4b-reward"] != 0 and measured["reward/brevity"] == 0


ON_THE_HUB = [name for name in REAL if "dataset" in str(FILES[name]["data"]["train"])]


def test_data_sets_of_the_hub_give_their_splits(tried: Tried) -> None:
    """Both splits are read, through the columns that the recipe names."""
    assert len(ON_THE_HUB) == 2
    for name in ON_THE_HUB:
        recipe = load(name, tried)
        trained, held_out = show_rows(recipe, 1, Folder("/none")).rows
        assert trained.facts[:2] == ("train", held_out.facts[1]) and held_out.facts[0] == "eval"
        assert trained.texts and not trained.problem
        if recipe.data.train[0].system:
            text = "".join(piece.text for piece in held_out.texts[0].pieces)
            assert recipe.data.train[0].system in text


def test_the_checked_answer_of_mathematics(tried: Tried) -> None:
    name = "models/qwen3-4b-gsm8k-grpo.yaml"
    reward, _ = load(name, tried).method.rewards  # type: ignore[union-attr]
    answers = ["The answer is 1,200.", "It is 7", "none", [{"role": "assistant", "content": "8"}]]
    references = ["a #### 1200", "b\n#### 8", "c #### 1", "d #### 8"]
    score = reward.load()
    assert score(completions=answers, reference=references) == [1.0, 0.0, 0.0, 1.0]
    assert score(completions=["5"], reference=["no number"]) == [None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["models/qwen3-4b-tools.yaml", *ON_THE_HUB])
def test_two_steps_on_rows_of_real_data(name: str, tried: Tried, tmp_path: Path) -> None:
    sampled = ("method.max_completion=16", "method.rollout_batch_size=8")
    check_steps(train_two_steps(name, tried, tmp_path, *(sampled if "grpo" in name else ())))


# what the comments say

FIGURE = re.compile(
    r"\b(\d+\.\d GiB|\d+ million|[\d,]+ tokens|\d+ answers|\d+ prompts|\d\.\de-\d\b)"
)
GPUS = re.compile(r"(\d+) GB")


def comments_of(name: str) -> str:
    """A recipe's comments, as running text."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    parts = [line.partition("# ")[2] for line in lines if "#" in line]
    return " ".join(part.strip() for part in parts)


def rows_of_the_readme() -> Iterator[tuple[str, str]]:
    """(recipe, row) of each table in the README."""
    for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| [") and (match := re.search(r"recipes/(\S+\.yaml)", line)):
            yield match[1], line


@cache
def real_sizes(base: str, adapter: str, head: Any, folder: Path) -> Sizes:
    """Sizes of a real model, from its configuration."""
    write_config(CONFIGS[base], folder)
    values = {
        "name": "real",
        "model": {"base": str(folder)},
        "adapter": yaml.safe_load(adapter),
        "method": {"kind": "reward" if head == "score" else "sft"},
        "data": {"train": [{"path": "/rows.jsonl"}]},
    }
    return sizes_of(recipe_from_dict(values))


class Real:
    """A recipe's memory with its real model."""

    def __init__(self, name: str, tried: Tried, folder: Path) -> None:
        self.name = FILES[name]["model"]["base"]
        home = folder / self.name
        write_config(CONFIGS[self.name], home)
        self.recipe = load(name, tried, f"model.base={home}")
        adapter = yaml.safe_dump(FILES[name].get("adapter"))
        sizes = real_sizes(self.name, adapter, self.recipe.method.head, home)
        self.sizes = replace(sizes, rewards=self.rewards(sizes))

    @property
    def memory(self) -> MemoryEstimate:
        return estimate(self.recipe, self.sizes)

    @property
    def parameters(self) -> int:
        return self.sizes.linear + self.sizes.frozen

    def rewards(self, sizes: Sizes) -> int:
        """Values of a reward model with the same base and rank as the trained one."""
        rewards = getattr(self.recipe.method, "rewards", [])
        loads = any("run" in dict(reward) for reward in rewards)
        return sizes.linear + sizes.frozen + sizes.trained if loads else 0

    def changed(self, section: str, **changes: Any) -> Recipe:
        part = getattr(self.recipe, section).model_copy(update=changes)
        return self.recipe.model_copy(update={section: part})

    def held(self, section: str, **changes: Any) -> MemoryEstimate:
        """What a changed recipe holds beside activations, which take long to follow."""
        return estimate(
            self.changed(section, **changes), replace(self.sizes, can_be_followed=False)
        )

    def figures(self) -> Iterator[str]:
        """Every figure that a comment may state; those that take long come last."""
        recipe, trained = self.recipe, self.sizes.trained
        yield f"{suggested_learning_rate(recipe):.1e}".replace("e-0", "e-")
        yield f"{trained / 1e6:.0f} million"
        yield f"{recipe.optim.batch_size * recipe.data.max_length:,} tokens"
        yield f"{recipe.data.max_length:,} tokens"
        yield f"{recipe.rows_per_step} prompts"
        yield f"{getattr(recipe.method, 'generations', 0)} answers"
        yield from map(amount, self.amounts())

    def amounts(self) -> Iterator[int]:
        recipe, trained = self.recipe, self.sizes.trained
        in_float32 = 4 * (self.parameters + trained)  # of a model that is trained whole
        yield from (in_float32, recipe.scale.most_workers * in_float32, 12 * trained, self.cache())
        whole = self.held("scale", strategy="ddp", workers=1)
        yield from (whole.weights + whole.training, self.held("model", quantize="none").weights)
        memory = self.memory
        yield from (memory.peak, memory.weights, memory.training, memory.activations)
        yield 2 * self.sizes.rewards
        plain = self.changed("model", gradient_checkpointing=False)
        yield estimate(plain, self.sizes).activations
        yield estimate(self.changed("data", max_length=2048), self.sizes).peak

    def cache(self) -> int:
        """Bytes of keys and values of the completions that are sampled at a time."""
        tokens = self.recipe.method.completions_at_once * self.recipe.data.max_length
        return tokens * self.sizes.layers * 2 * self.sizes.keys * 2


@pytest.fixture(scope="module")
def real(tried: Tried, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Real]:
    folder = tmp_path_factory.mktemp("real")
    return cache(lambda name: Real(name, tried, folder))


@pytest.mark.long
@pytest.mark.parametrize("name", REAL)
def test_every_figure_in_a_comment_is_computed(name: str, real: Callable[[str], Real]) -> None:
    text, recipe = comments_of(name), real(name)
    stated = set(FIGURE.findall(text))
    assert stated
    for figure in recipe.figures():
        stated.discard(figure)
        if not stated:
            break
    assert not stated
    assert f"GPU memory: about {amount(recipe.memory.peak)}" in text
    assert ", estimated" in text


@pytest.mark.parametrize("name", REAL)
def test_it_fits_the_gpus_that_it_names(name: str, real: Callable[[str], Real]) -> None:
    recipe = real(name)
    row = dict(rows_of_the_readme())[name]
    assert amount(recipe.memory.peak) in row
    (size,) = GPUS.findall(row)
    assert f"{size} GB" in comments_of(name)
    gpu = Gpu(f"{size} GB", int(size) * 10**9)
    verdict = judge(recipe.recipe, {recipe.recipe.model.quantize: recipe.sizes}, [gpu])
    assert verdict.fits and not verdict.is_tight, verdict.text


def test_a_figure_that_is_wrong_is_noticed(real: Callable[[str], Real]) -> None:
    """With a larger microbatch the figures of the comments are no longer those of the recipe."""
    recipe = copy.copy(real("models/qwen3-4b-lora.yaml"))
    optim = recipe.recipe.optim.model_copy(update={"micro_batch_size": 64, "batch_size": 64})
    recipe.recipe = recipe.recipe.model_copy(update={"optim": optim})
    stated = set(FIGURE.findall(comments_of("models/qwen3-4b-lora.yaml")))
    assert {"1.4 GiB", "21.2 GiB", "32,768 tokens"} == stated - {*recipe.figures()}
    verdict = judge(
        recipe.recipe, {recipe.recipe.model.quantize: recipe.sizes}, [Gpu("24 GB", 24 * 10**9)]
    )
    assert verdict.is_tight


def test_the_readme_lists_each_file_once_with_its_command() -> None:
    listed = [name for name, _ in rows_of_the_readme()]
    assert sorted(listed) == sorted(name for name in FILES if not name.startswith("quickstart/"))
    for name in listed:
        assert COMMAND_OF[name] in COMMANDS
        assert (COMMAND_OF[name] == "tune") == (name in SWEEPS)


# sweeps


def plan_of(name: str, tried: Tried) -> Plan:
    base = ((FOLDER / name).parent / FILES[name]["recipe"]).resolve()
    storage = (f"storage={tried.storage}",)
    return make_plan(load_sweep(FOLDER / name, storage, tuple(tried.swaps(name_of(base)))))


def kinds_of_sweep(plan: Plan) -> set[str]:
    sweep = plan.sweep
    facts = {
        "default": sweep.search == "default",
        "conditional": sweep.search != "default"
        and sweep.sampler == "tpe"
        and any(distribution.when for distribution in sweep.search.values()),
        "grid": sweep.sampler == "grid",
        "several objectives": len(plan.metrics) > 1,
        "population": plan.is_population,
    }
    return {kind for kind, holds in facts.items() if holds}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_is_accepted(name: str, tried: Tried) -> None:
    plan = plan_of(name, tried)
    assert plan.space.searched and not plan.excluded_count
    every = plan.combinations.every_setting()
    if plan.sweep.sampler == "grid":
        assert every is not None and plan.sweep.trials == len(every)
    examine(plan.recipe.model_copy(update={"optim": _FEW}), fresh=True)


def test_there_is_a_sweep_of_each_kind(tried: Tried) -> None:
    kinds = [kinds_of_sweep(plan_of(name, tried)) for name in SWEEPS]
    every = {"default", "conditional", "grid", "several objectives", "population"}
    assert set().union(*kinds) == every


# clusters


@pytest.mark.parametrize("name", [name for name in REAL if COMMAND_OF[name] == "job submit"])
def test_a_job_takes_all_it_needs_along(name: str, tried: Tried, tmp_path: Path) -> None:
    recipe = load_recipe(FOLDER / name, [f"data.train.0.path={tried.rows(name)}"])
    staged = stage(recipe, tmp_path, ())
    sent = recipe_from_dict(values_of(tmp_path / RECIPE_FILE))
    (source,) = sent.data.train
    assert (tmp_path / source.path).read_bytes() == tried.rows(name).read_bytes()
    assert staged.bytes == tried.rows(name).stat().st_size
    assert sent.model_copy(update={"data": recipe.data}) == recipe
    assert sent.model.base in CONFIGS, "a hub id, which every node can fetch"


@pytest.mark.parametrize("name", [name for name in REAL if COMMAND_OF[name] == "k8s render"])
def test_a_rayjob_is_valid(name: str) -> None:
    recipe = load_recipe(FOLDER / name)
    job = yaml.safe_load(render(recipe, Target("gpu", "finray")))
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert group["maxReplicas"] == recipe.scale.workers
    assert job["spec"]["jobId"] == recipe.name
    inside = recipe_from_dict(yaml.safe_load(recipe_text(job)))
    assert inside == recipe
    if SCHEMAS.is_dir():
        check_ray(job)


def test_there_is_a_job_of_each_kind() -> None:
    assert {"job submit", "k8s render"} <= set(COMMAND_OF.values())
