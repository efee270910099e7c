"""A non-finite loss or gradient updates no rank, and is recorded."""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import steps
from support.cases import mostly_slow
from support.guarded import assert_same, lines, recipe, run_to_the_end, spoil
from transformers import AutoModelForCausalLM

from finray.training.common.errors import RunError
from finray.training.config.recipe import Recipe
from finray.training.data.batching import Batch, in_batches
from finray.training.data.stream import Sequence
from finray.training.engine.methods import objective_of
from finray.training.engine.nonfinite import NonFiniteError, NonFiniteSteps
from finray.training.engine.optimizer import MasterAdamW, SkippingAdamW
from finray.training.engine.trainer import StepMeasures, StreamTrainer
from finray.training.engine.trainer_arguments import training_arguments
from finray.training.launch.in_process import InProcessLauncher
from finray.training.run import train

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
POISONED_STEP = 3
State = dict[str, torch.Tensor]


def trained(
    base: Path, scratch: Path, rank: int, world_size: int, poison: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Weights and optimizer after each of five steps; one step is not finite on the last rank."""
    settings = Recipe.model_validate(
        {
            "name": "x",
            "model": {"base": str(base)},
            "data": {"train": [{"path": "/x"}]},
            "optim": {"batch_size": 4, "micro_batch_size": 1, "schedule": "linear"},
        }
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    share = 4 // world_size
    rows = [
        Sequence(
            torch.randint(3, 250, (6,)).int().numpy(),
            torch.tensor([6]).int().numpy(),
            torch.ones(6, dtype=torch.bool).numpy(),
            torch.tensor([number]).numpy(),
        )
        for number in range(20)
    ]
    own = [row for row in rows if int(row.rows[0]) % 4 // share == rank]
    states: list[State] = []
    logged: list[tuple[float, float, list[int]]] = []

    def after_step(measures: StepMeasures) -> bool:
        state = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        saved = trainer.optimizer.state_dict()
        for index, moments in saved["state"].items():
            state |= {f"{index}.{name}": copy.deepcopy(value) for name, value in moments.items()}
        state |= {f"master.{i}": item.clone() for i, item in enumerate(saved.get("masters", []))}
        states.append(state)
        taken = trainer.take_logged(1, measures.grad_norm)
        logged.append((measures.learning_rate, taken.loss, taken.skipped))
        return False

    objective = objective_of(steps.make_setup(settings, model, scratch, rank, world_size))
    trainer = StreamTrainer(
        model,
        training_arguments(settings, 5, scratch),
        objective=objective,
        passes=1,
        rows=lambda: in_batches(iter(own), share),
        after_step=after_step,
        is_logged=lambda step: True,
        stop_requested=lambda: False,
    )
    honest = objective.loss

    def loss(wrapped: torch.nn.Module, batch: Batch, measured: bool) -> Any:
        result = honest(wrapped, batch, measured)
        if poison == "none" or int(batch.rows[0]) != 4 * POISONED_STEP - 1:
            return result
        if poison == "loss":  # not finite itself, and its gradient is
            return copy.copy(type(result)(result.total + math.inf, result.measures))
        result.total.register_hook(lambda gradient: gradient * math.inf)
        return result

    objective.loss = loss
    trainer.train()
    return {"states": states, "logged": logged, "masters": isinstance(trainer._adamw, MasterAdamW)}


@pytest.fixture(scope="module")
def of_rank_0(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int, str], dict[str, Any]]:
    """Rank 0's undisturbed run, of so many workers and this type; made once."""

    @cache
    def make(workers: int, dtype: str) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("undisturbed")
        return ranks(tiny_model, folder, workers, "none", dtype)[0]

    return make


def ranks(base: Path, folder: Path, workers: int, poison: str, dtype: str) -> list[dict[str, Any]]:
    """What each rank reports of a run."""
    kind: torch.dtype = getattr(torch, dtype)

    def work(rank: int, size: int) -> dict[str, Any]:
        return trained(base, folder, rank, size, poison, kind)

    return [work(0, 1)] if workers == 1 else steps.by_workers(workers, folder, work)


@pytest.mark.long
@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize(("workers", "dtype"), [(1, "float32"), (1, "bfloat16"), (2, "float32")])
def test_the_step_changes_nothing(
    tiny_model: Path,
    tmp_path: Path,
    of_rank_0: Callable[[int, str], dict[str, Any]],
    poison: str,
    workers: int,
    dtype: str,
) -> None:
    """It occurs on one of two ranks. The learning-rate schedule continues unchanged."""
    result = ranks(tiny_model, tmp_path, workers, poison, dtype)
    undisturbed = of_rank_0(workers, dtype)
    at = POISONED_STEP - 1
    for rank in result:
        assert rank["masters"] == (dtype == "bfloat16")
        states = rank["states"]
        assert states[at].keys() == states[at - 1].keys()
        for name, value in states[at].items():
            assert torch.equal(value, states[at - 1][name]), name
        for before, after in ((at - 2, at - 1), (at, at + 1)):
            assert any(
                not torch.equal(states[after][key], states[before][key]) for key in states[0]
            )
        assert all(value.isfinite().all() for state in states for value in state.values())
        assert [skipped for _, _, skipped in rank["logged"]] == [[], [], [POISONED_STEP], [], []]
        assert math.isnan(rank["logged"][at][1])
        rates = [rate for rate, _, _ in undisturbed["logged"]]
        assert [rate for rate, _, _ in rank["logged"]] == rates and len(set(rates)) == 5
        assert rank["logged"][1][1] == undisturbed["logged"][1][1]
    for name, value in result[0]["states"][-1].items():
        assert torch.equal(value, result[-1]["states"][-1][name]), "the ranks differ"


def test_fp16_scaler_and_the_guard_agree() -> None:
    """Either of them skips the step, and the next step is taken."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = SkippingAdamW([{"params": [weight]}], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    taken = []
    for factor, skip in ((1.0, 0.0), (math.inf, 0.0), (1.0, 1.0), (1.0, 0.0)):
        before = weight.detach().clone()
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer)
        optimizer.skip = torch.tensor(skip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken.append(not torch.equal(before, weight))
    assert taken == [True, False, False, True]
    assert float(optimizer.state[weight]["step"]) == 2
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize(("scaled", "patience"), [(False, 3), (True, 19)])
def test_patience(scaled: bool, patience: int) -> None:
    """Only consecutive steps count; fp16's scaler gets more of them to find its scale."""
    steps_ = NonFiniteSteps(torch.device("cpu"), 3, scaled)
    flags = [1.0] * (patience - 1) + [0.0] + [1.0] * patience
    for step, flag in enumerate(flags, start=1):
        steps_.check()
        steps_.add(step, torch.tensor(flag), torch.tensor(2.0 if flag == 0.0 else math.nan))
        steps_.read_flags(step)
    with pytest.raises(NonFiniteError) as error:
        steps_.check()
    assert error.value.steps == tuple(range(patience + 1, 2 * patience + 1))
    assert float(steps_.take_loss()) == 2.0
    assert steps_.take_steps() == [step for step, flag in enumerate(flags, 1) if flag]


def poison_row(row: int) -> Callable[[Batch, torch.Tensor], torch.Tensor]:
    return lambda batch, total: total * math.nan if row in batch.rows else total


Reports = dict[int, dict[str, float]]


@pytest.fixture(scope="module")
def poisoned(
    tiny_model: Path, chat_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Reports]]:
    """A run of 30 steps with a poisoned row, which is only read, and what it reported."""
    storage = tmp_path_factory.mktemp("poisoned")
    logged: Reports = {}
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, poison_row(17))

        def report(line: dict[str, float]) -> None:
            logged[int(line["step"])] = line

        settings = recipe(tiny_model, chat_file, storage, "run", max_steps=30)
        train(settings, InProcessLauncher(report=report))
    yield storage / "run", logged


def record_of(run: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return values


@pytest.mark.long
def test_a_poisoned_row(
    tiny_model: Path,
    chat_file: Path,
    tmp_path: Path,
    poisoned: tuple[Path, Reports],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One step is skipped and recorded with its rows; the logged mean leaves it out."""
    run, logged = poisoned
    record = record_of(run)
    (skipped,) = record["skipped"]
    step = skipped["step"]
    assert 18 in skipped["rows"][str(chat_file)] and len(skipped["rows"][str(chat_file)]) == 8
    each = lines(run)
    assert each[step]["skipped"] == 1 and each[step]["loss"] is None
    assert each[step]["grad_norm"] is None
    # A sweep does not judge a trial by a loss that no step was taken with.
    assert [at for at, line in logged.items() if "loss" not in line] == [step]
    assert [at for at, line in each.items() if "skipped" in line] == [step]
    assert math.isfinite(record["metrics"]["loss"]) and "restarts" not in record
    report = (run / "report.html").read_text(encoding="utf-8")
    assert f"<dt>Skipped steps</dt><dd>{step}</dd>" in report
    spoil(monkeypatch, poison_row(17))
    settings = recipe(tiny_model, chat_file, tmp_path, "rarely", max_steps=30)
    log = settings.log.model_copy(update={"every_steps": 30})
    run_to_the_end(settings.model_copy(update={"log": log}))
    for at, line in lines(tmp_path / "rarely").items():
        window = range(1 + (at - 1) // 4 * 4, at + 1)  # from one checkpoint to the next
        means = [each[number]["loss"] for number in window if number != step]
        assert line["loss"] == pytest.approx(sum(means) / len(means), rel=1e-5)
        assert line.get("skipped", 0) == (step in window)


def test_resumed_behind_a_skipped_step(
    tiny_model: Path,
    chat_file: Path,
    tmp_path: Path,
    poisoned: tuple[Path, Reports],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, poison_row(17))
    run, again = poisoned[0], tmp_path / "again" / "run"
    at = record_of(run)["skipped"][0]["step"]
    shutil.copytree(run.parent, tmp_path / "again")
    for checkpoint in (again / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) >= at + 4:
            shutil.rmtree(checkpoint)
    record = record_of(again)
    (again / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    resumed = run_to_the_end(recipe(tiny_model, chat_file, tmp_path / "again", "run", max_steps=30))
    assert len(resumed["restarts"]) == 1 and resumed["skipped"] == record["skipped"]
    assert_same(again, run)


@pytest.mark.long
@pytest.mark.parametrize(("log_every", "faults"), mostly_slow([(1, 3), (100, 2)], quick={(100, 2)}))
def test_a_transient_fault_is_cured(
    tiny_model: Path,
    chat_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log_every: int,
    faults: int,
) -> None:
    """Consecutive steps from the fifth fail once: the run rolls back, and its result is the same.

    That holds too if the check happens after a step that is not logged.
    """

    def run(name: str) -> dict[str, Any]:
        settings = recipe(tiny_model, chat_file, tmp_path, name, max_skipped_steps=faults)
        log = settings.log.model_copy(update={"every_steps": log_every})
        return run_to_the_end(settings.model_copy(update={"log": log}))

    run("clean")
    calls = [0]

    def change(batch: Batch, total: torch.Tensor) -> torch.Tensor:
        calls[0] += 1  # two a step
        return total * math.inf if 8 < calls[0] <= 8 + 2 * faults else total

    spoil(monkeypatch, change)
    record = run("run")
    assert_same(tmp_path / "run", tmp_path / "clean")
    steps_ = range(5, 5 + faults)
    first, second = record["restarts"]
    assert first["step"] == steps_[-1]
    assert f"steps {', '.join(map(str, steps_))}" in first["reason"]
    assert second == {"step": 4, "reason": "resumed from step-00000004"}
    assert record["skipped"] == []


def test_a_lasting_fault_ends_the_run(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = [0]
    bad: set[int] = set()

    def change(batch: Batch, total: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if 12 < calls[0] <= 16:  # steps 7 and 8 of two passes
            bad.update(batch.rows.tolist())
        return total * math.nan if bad & set(batch.rows.tolist()) else total

    spoil(monkeypatch, change)
    settings = recipe(tiny_model, chat_file, tmp_path, "run", max_skipped_steps=2)
    with pytest.raises(RunError) as error:
        run_to_the_end(settings)
    message = str(error.value)
    assert (
        "steps 7, 8" in message and "optim.learning_rate" in message and str(chat_file) in message
    )
    shown = {int(number) for number in re.findall(r"rows ([\d, ]+) of", message)[0].split(", ")}
    assert len(shown) == 8 and {number - 1 for number in shown} < bad
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "failed" and record["error"] == message
    assert [item["step"] for item in record["restarts"]] == [8, 4]
