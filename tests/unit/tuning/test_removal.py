"""Deleting runs and leftovers: what is kept and why, and deaths and starts in between."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs as pafs
from support.stored_runs import checkpoint, stored_run

from finray.cluster.api.housekeeping import find_run, plan_clean, plan_prune, plan_rm
from finray.cluster.cli.main import main
from finray.training.common import storage as storage_module
from finray.training.common.errors import InputError
from finray.training.common.lock import hold_run_lock
from finray.training.common.progress import SILENT
from finray.training.common.storage import Folder
from finray.training.config.recipe import recipe_from_dict
from finray.training.records.notes import noted_runs
from finray.training.records.run_folder import list_runs
from finray.training.rehearsal.key import key_of
from finray.tuning.removal import DELETED_FOLDER, Removal, remove
from finray.tuning.storage_contents import contents_of

DAY = 86400.0


def names(removal: Removal) -> list[str]:
    return sorted(item.name for item in removal.doomed)


def kept(removal: Removal) -> dict[str, str]:
    return dict(removal.kept)


def rm(storage: Path, *runs: str, unfinished: bool = False) -> Removal:
    return plan_rm(runs, Folder(str(storage)), unfinished)


def in_storage(path: Path) -> set[str]:
    return {each.name for each in path.iterdir()}


def make_old(path: Path, days: float = 2) -> None:
    """Set the time of a folder and all in it."""
    for each in (*path.rglob("*"), path):
        os.utime(each, (time.time() - days * DAY,) * 2)


def test_a_dry_run_says_the_size_and_deletes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stored_run(tmp_path, "old")
    size = sum(file.stat().st_size for file in run.iterdir())
    assert main(["runs", "rm", "old", "--storage", str(tmp_path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["bytes"], said["deleted"]) == (size, [])
    assert [item["name"] for item in said["remove"]] == ["old"]
    assert main(["--quiet", "runs", "rm", "old", "--storage", str(tmp_path)]) == 0
    assert "nothing is deleted yet; add --yes" in capsys.readouterr().out
    assert run.exists()
    assert main(["--quiet", "runs", "rm", "old", "--storage", str(tmp_path), "--yes"]) == 0
    assert in_storage(tmp_path) == set()


@pytest.mark.parametrize(
    "recipe",
    [
        lambda run: {"model": {"base": "owner/base", "adapter": f"{run}/adapter"}},
        lambda run: {"model": {"base": f"{run}/model"}},
        lambda run: {"method": {"kind": "dpo", "reference_model": str(run)}},
        lambda run: {"method": {"kind": "grpo", "rewards": [{"run": str(run)}]}},
        lambda run: {"data": {"train": [{"path": f"{run}/inputs/rows.jsonl"}]}},
    ],
)
def test_what_another_run_refers_to_is_kept_and_named(
    tmp_path: Path, recipe: Callable[[Path], dict[str, Any]]
) -> None:
    run = stored_run(tmp_path, "first")
    stored_run(tmp_path, "second", recipe=recipe(run))
    stored_run(tmp_path, "first.1")
    assert "second refers to it" in kept(rm(tmp_path, "first"))["first"]
    assert names(rm(tmp_path, "first.1")) == ["first.1"], "a name that only begins the same"
    assert names(rm(tmp_path, "first", "second")) == ["first", "second"], "both go"


def test_a_chain_is_kept_from_its_end(tmp_path: Path) -> None:
    """c starts from b, b from a; c is unfinished, so neither b nor a goes."""
    a = stored_run(tmp_path, "a")
    b = stored_run(tmp_path, "b", recipe={"model": {"base": "x", "adapter": f"{a}/adapter"}})
    c = stored_run(
        tmp_path, "c", status="stopped", recipe={"model": {"base": "x", "adapter": f"{b}/adapter"}}
    )
    checkpoint(c)
    assert sorted(kept(rm(tmp_path, "a", "b", "c"))) == ["a", "b", "c"]
    assert names(rm(tmp_path, "a", "b", "c", unfinished=True)) == ["a", "b", "c"]


def test_references_survive_a_move_of_the_storage_and_links(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "before", "first")
    stored_run(
        tmp_path / "before", "second", recipe={"model": {"base": "x", "adapter": f"{run}/adapter"}}
    )
    (tmp_path / "before").rename(tmp_path / "after")
    assert "second" in kept(rm(tmp_path / "after", "first"))["first"]
    (tmp_path / "link").symlink_to(tmp_path / "after")
    assert "second" in kept(rm(tmp_path / "link", "first"))["first"]


def test_a_storage_named_otherwise_than_in_the_recipe(tmp_path: Path) -> None:
    """By a URI of the disk, by a link to the run, and the other way round."""
    runs = tmp_path / "runs"
    run = stored_run(runs, "first")
    stored_run(runs, "second", recipe={"model": {"base": "x", "adapter": f"{run}/adapter"}})
    stored_run(runs, "third", recipe={"model": {"base": f"file://{runs}/second/model"}})
    (tmp_path / "link").symlink_to(run)
    for chosen in ("first", f"file://{run}", str(tmp_path / "link"), f"file://{tmp_path}/link"):
        removal = plan_rm([chosen], Folder(f"file://{runs}"), unfinished=False)
        assert "second refers to it" in kept(removal)["first"], chosen
    assert "third refers to it" in kept(rm(runs, "second"))["second"]


QUERY = "?endpoint_override=127.0.0.1:9&scheme=http"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the object store s3://bucket at the address of QUERY."""

    def open_root(root: str) -> tuple[Any, str]:
        if not root.startswith("s3://"):
            return pafs.LocalFileSystem(), "/"
        assert root == f"s3://bucket{QUERY}", "the query leads to the store"
        return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "bucket"

    monkeypatch.setattr(storage_module, "_filesystem", open_root)
    return tmp_path / "bucket"


@pytest.mark.parametrize(
    "place", [f"s3://bucket/runs/first/adapter{QUERY}", "s3://bucket/runs/first/adapter"]
)
def test_references_in_an_object_store_with_a_query(bucket: Path, place: str) -> None:
    home = Folder(f"s3://bucket/runs{QUERY}")
    at_home = {"storage": home.uri}
    stored_run(bucket / "runs", "first", recipe=at_home)
    stored_run(bucket / "runs", "first.1", recipe=at_home)
    recipe = at_home | {"model": {"base": "x", "adapter": place}}
    stored_run(bucket / "runs", "second", recipe=recipe)
    assert "second refers to it" in kept(plan_rm(["first"], home, False))["first"]
    removal = plan_rm([(home / "first.1").uri], home, False)
    assert names(removal) == ["first.1"] and removal.storage == home
    (bucket / "runs").rename(bucket / "later")
    later = Folder(f"s3://bucket/later{QUERY}")
    by_old = kept(plan_rm(["first"], later, False))["first"]
    assert "second refers to it" in by_old, "the recipes name the storage of before"


def test_what_a_sweep_refers_to_and_its_trials_are_kept(tmp_path: Path) -> None:
    run = stored_run(tmp_path, "start")
    sweep = tmp_path / "sweep"
    recipe = {"model": {"base": "x", "adapter": f"{run}/adapter"}}
    stored_run(sweep / "trials", "trial-0000", recipe=recipe, prepared="a" * 16)
    record = {"name": "sweep", "status": "finished", "trials": [], "prepared": ["b" * 16]}
    (sweep / "sweep.json").write_text(json.dumps(record), encoding="utf-8")
    assert "sweep refers to it" in kept(rm(tmp_path, "start"))["start"]
    with pytest.raises(InputError, match="a trial of the sweep sweep"):
        rm(tmp_path, str(sweep / "trials" / "trial-0000"))
    (entry,) = [entry for entry in contents_of(Folder(str(tmp_path))) if entry.kind == "sweep"]
    assert entry.prepared == {"a" * 16, "b" * 16}


def test_unreadable_records_keep_what_they_may_refer_to_and_stay(tmp_path: Path) -> None:
    first, second = stored_run(tmp_path, "first"), stored_run(tmp_path, "second")
    stored_run(tmp_path, "goes", metrics={"eval_loss": 1.0})
    recipe = {"model": {"base": "x", "adapter": f"{first}/adapter"}}
    damaged = stored_run(tmp_path, "damaged", recipe=recipe)
    (damaged / "run.json").write_bytes(b"")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(f'{{"adapter": "{second}/ad', encoding="utf-8")
    pruned = plan_prune(
        *(Folder(str(tmp_path)),),
        keep_best=None,
        by="eval_loss",
        older_than=DAY,
        unfinished=True,
    )
    assert names(pruned) == ["goes"]
    assert "damaged refers to it (recipe.yaml: model.adapter)" in kept(pruned)["first"]
    assert "sweep refers to it (sweep.json, which cannot be read)" in kept(pruned)["second"]
    assert "run.json: expected a JSON object" in kept(pruned)["damaged"]
    assert names(rm(tmp_path, "goes")) == ["goes"]
    for name in ("damaged", "sweep"):
        assert kept(rm(tmp_path, name))[name].endswith("; --unfinished deletes it")
        assert names(rm(tmp_path, name, unfinished=True)) == [name]
    with pytest.raises(InputError, match=r"run\.json: expected a JSON object"):
        plan_clean(Folder(str(tmp_path)), DAY)
    assert remove(rm(tmp_path, "damaged", unfinished=True), SILENT) == (["damaged"], [])


def test_what_may_not_be_read_stops_no_other_removal(tmp_path: Path) -> None:
    """Folders in the place of files: nobody can read them, root neither."""
    stored_run(tmp_path, "goes")
    (closed := tmp_path / "closed").mkdir()
    for name in ("run.json", "note.json", "recipe.yaml"):
        (closed / name).mkdir()
    (tmp_path / "swept" / "sweep.json").mkdir(parents=True)
    listed = dict(noted_runs(Folder(str(tmp_path))))
    assert "run.json: cannot be read" in listed["closed"]["problem"] and "goes" in listed
    assert names(rm(tmp_path, "goes")) == ["goes"]
    newer = stored_run(tmp_path, "newer")
    (newer / "run.json").write_text('{"format": 99}', encoding="utf-8")
    assert "upgrade finray" in kept(rm(tmp_path, "newer", unfinished=True))["newer"]
    assert "cannot be read" in kept(rm(tmp_path, "closed"))["closed"]
    assert "sweep.json: cannot be read" in kept(rm(tmp_path, "swept"))["swept"]


def test_a_run_in_use_is_kept(tmp_path: Path) -> None:
    run = stored_run(tmp_path, "busy")
    with hold_run_lock(Folder(str(run)), threading.Event(), SILENT):
        assert "in use by process" in kept(rm(tmp_path, "busy", unfinished=True))["busy"]
    assert names(rm(tmp_path, "busy")) == ["busy"]


def test_a_run_that_starts_or_changes_after_the_plan_is_kept(tmp_path: Path) -> None:
    starts, changes = stored_run(tmp_path, "starts"), stored_run(tmp_path, "changes")
    stored_run(tmp_path, "goes")
    plan = rm(tmp_path, "starts", "changes", "goes")
    (changes / "run.json").write_text('{"status": "running", "step": 3}', encoding="utf-8")
    with hold_run_lock(Folder(str(starts)), threading.Event(), SILENT):
        deleted, left = remove(plan, SILENT)
    assert deleted == ["goes"] and [line.partition(" is kept: ")[0] for line in left] == [
        "starts",
        "changes",
    ]
    assert in_storage(tmp_path) == {"starts", "changes"}


def test_what_cannot_be_deleted_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored_run(tmp_path, "held"), stored_run(tmp_path, "goes")
    move = Folder.move_to

    def move_some(folder: Folder, target: Folder) -> None:
        if folder.name == "held":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        move(folder, target)

    monkeypatch.setattr(Folder, "move_to", move_some)
    assert main(["runs", "rm", "held", "goes", "--storage", str(tmp_path), "--yes"]) == 1
    out, err = capsys.readouterr()
    assert "deleted 1 of 2" in out and "held cannot be deleted: Read-only file system" in err
    assert in_storage(tmp_path) == {"held"}


def test_a_death_half_way_leaves_a_whole_run_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_run(tmp_path, "run")
    plan = rm(tmp_path, "run")

    class DeathError(Exception):
        pass

    delete = Folder.delete

    def die(folder: Folder, name: str = "") -> None:
        if DELETED_FOLDER in folder.uri:
            raise DeathError
        delete(folder, name)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "delete", die)
        with pytest.raises(DeathError):
            remove(plan, SILENT)
    assert not (tmp_path / "run").exists() and list_runs(Folder(str(tmp_path))) == []
    cleaned = plan_clean(Folder(str(tmp_path)), DAY)
    assert [item.kind for item in cleaned.doomed] == ["deleted"]
    remove(cleaned, SILENT)
    assert not (tmp_path / DELETED_FOLDER).exists()


def test_prune_keeps_the_best_the_young_and_the_unfinished(tmp_path: Path) -> None:
    for number, loss in enumerate([0.5, 0.3, None, 0.4]):
        metrics = {} if loss is None else {"eval_loss": loss}
        stored_run(tmp_path, f"old-{number}", metrics=metrics)
    stored_run(tmp_path, "young", metrics={"eval_loss": 9.0}, finished_at="2999-01-01T00:00:00Z")
    stored_run(tmp_path, "pairs", method="dpo", metrics={"eval_loss": 8.0})
    checkpoint(stored_run(tmp_path, "half", status="failed", metrics={"eval_loss": 7.0}))

    def prune(**how: Any) -> Removal:
        given = {"keep_best": None, "by": "eval_loss", "older_than": None, "unfinished": False}
        return plan_prune(Folder(str(tmp_path)), **(given | how))

    both = prune(keep_best=2, older_than=30 * DAY)
    assert names(both) == ["old-0", "old-2"]
    assert [item.why.endswith(", no eval_loss") for item in both.doomed] == [False, True]
    assert set(kept(both)) == {"old-1", "old-3", "young", "pairs", "half"}
    assert "step 10 of 10" in kept(both)["half"]
    assert "young" in names(prune(keep_best=1))
    assert "half" in names(prune(older_than=DAY, unfinished=True))
    with pytest.raises(InputError, match="no run has this metric; there are eval_loss"):
        prune(keep_best=1, by="rouge")
    with pytest.raises(InputError, match="give --keep-best or --older-than"):
        prune()


REWARDS = {"method": {"kind": "grpo", "rewards": [{"run": "/runs/cost", "weight": -1.0}]}}
FUNCTION = {"eval": {"metrics": [{"file": "/home/score.py:odd", "mode": "min"}]}}


@pytest.mark.parametrize(
    ("metric", "recipe", "best"),
    [
        ("eval_loss", {}, "low"),
        ("exact_match", {}, "high"),
        ("eval_token_f1", {}, "high"),
        ("eval_bleu", {}, "high"),
        ("eval_rougeL", {}, "high"),
        ("eval_odd", FUNCTION, "low"),
        ("eval_odd", {"eval": {"metrics": [{"file": "/home/score.py:odd"}]}}, "high"),
        ("eval_reward/cost", REWARDS, "low"),
    ],
)
def test_the_best_by_any_metric_is_kept_and_comes_first(
    tmp_path: Path,
    metric: str,
    recipe: dict[str, Any],
    best: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("high", 0.9), ("low", 0.1)):
        stored_run(tmp_path, name, metrics={metric: value}, recipe=recipe)
    words = ["runs", "prune", "--keep-best", "1", "--by", metric, "--storage", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in said["keep"]] == [best]
    assert main(["runs", "--sort", metric, "--storage", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == best


def test_prune_refuses_an_unknown_direction_and_a_negative_number(tmp_path: Path) -> None:
    stored_run(tmp_path, "max", metrics={"eval_odd": 1.0, "eval_loss": 1.0})
    how: dict[str, Any] = {"older_than": None, "unfinished": False}
    storage = Folder(str(tmp_path))
    with pytest.raises(InputError, match="do not say, or do not agree, which direction is better"):
        plan_prune(storage, keep_best=1, by="eval_odd", **how)
    stored_run(tmp_path, "min", metrics={"eval_odd": 2.0}, recipe=FUNCTION)
    assert names(plan_prune(storage, keep_best=1, by="eval_odd", **how)) == ["min"]
    other = {"eval": {"metrics": [{"file": "score.py:odd", "mode": "max"}]}}
    stored_run(tmp_path, "other", metrics={"eval_odd": 2.0}, recipe=other)
    with pytest.raises(InputError, match="or do not agree"):
        plan_prune(storage, keep_best=1, by="eval_odd", **how)
    with pytest.raises(InputError, match="--keep-best: -1 is below 0"):
        plan_prune(storage, keep_best=-1, by="eval_loss", **how)


def test_clean_takes_what_no_run_refers_to(tmp_path: Path) -> None:
    stored_run(tmp_path, "run", prepared="a" * 16)
    home = tmp_path / "prepared"
    for name in ("a" * 16, "b" * 16, "c" * 16, "stages/old", "rehearsals"):
        (home / name).mkdir(parents=True)
    (home / ("b" * 16) / "rows").write_bytes(b"x" * 1000)
    (home / "rehearsals" / "0.json").write_text("{}")
    (home / ("a" * 16) / ("d" * 32)).mkdir()
    (tmp_path / ".run.json.0123abcd").write_text("")
    make_old(tmp_path)
    Folder(str(home / ("c" * 16))).touch()
    plan = plan_clean(Folder(str(tmp_path)), DAY)
    assert names(plan) == sorted(
        [
            ".run.json.0123abcd",
            f"prepared/{'a' * 16}/{'d' * 32}",
            f"prepared/{'b' * 16}",
            "prepared/rehearsals/0.json",
            "prepared/stages/old",
        ]
    )
    assert "run was trained on it" in kept(plan)[f"prepared/{'a' * 16}"]
    assert kept(plan)[f"prepared/{'c' * 16}"].startswith("used ")
    assert plan.size == 1002
    assert len(remove(plan, SILENT)[0]) == len(plan.doomed)
    assert in_storage(home) == {"a" * 16, "c" * 16, "stages", "rehearsals"}


def test_clean_takes_windows_of_runs_that_do_not_train(tmp_path: Path) -> None:
    """What is counted, and the lists of bad rows, stay for the run and its user."""
    for name in ("killed", "busy", "elsewhere"):
        run = stored_run(tmp_path, name, status="running")
        checkpoint(run)
        for window in ("000003", "000004"):
            (run / "windows" / window / ("d" * 32)).mkdir(parents=True)
            (run / "windows" / window / "manifest.json").write_bytes(b"x" * 500)
        for file in ("counts.json", "position.json", "000003-quarantine.jsonl"):
            (run / "windows" / file).write_text("{}")
    make_old(tmp_path)
    (tmp_path / "elsewhere" / "lock.json").write_text("{}")
    (tmp_path / "killed" / "windows" / "000004" / "used").write_text("")
    with hold_run_lock(Folder(str(tmp_path / "busy")), threading.Event(), SILENT):
        plan = plan_clean(Folder(str(tmp_path)), DAY)
    assert names(plan) == ["killed/windows/000003"] and plan.size == 500
    assert kept(plan)["busy/windows"].startswith("in use by process")
    assert kept(plan)["elsewhere/windows"] == "its lock was renewed just now"
    assert kept(plan)["killed/windows/000004"].startswith("used ")
    assert remove(plan, SILENT) == (names(plan), [])
    left = in_storage(tmp_path / "killed" / "windows")
    assert left == {"000004", "counts.json", "position.json", "000003-quarantine.jsonl"}


def test_data_that_a_run_starts_to_use_after_the_plan_stays(tmp_path: Path) -> None:
    data = tmp_path / "prepared" / ("b" * 16)
    (data / "train").mkdir(parents=True)
    make_old(tmp_path)
    plan = plan_clean(Folder(str(tmp_path)), DAY)
    Folder(str(data)).touch()
    assert not remove(plan, SILENT)[0] and (data / "train").exists()


def test_stages_of_a_set_that_stays_are_kept(tmp_path: Path) -> None:
    stored_run(tmp_path, "run", prepared="a" * 16)
    home = tmp_path / "prepared"
    for name in ("a" * 16, "stages/used", "stages/unused"):
        (home / name).mkdir(parents=True)
    (home / ("a" * 16) / "stages.json").write_text('["used"]')
    make_old(tmp_path)
    assert names(plan_clean(Folder(str(tmp_path)), DAY)) == ["prepared/stages/unused"]


@pytest.mark.parametrize("decided", [None, False, True])
def test_the_rehearsal_of_a_run_is_kept(
    tmp_path: Path, tiny_model: Path, decided: bool | None
) -> None:
    """Its recipe.yaml says what was decided, and its user's recipe perhaps nothing."""
    recipe = {
        "name": "run",
        "model": {"base": str(tiny_model)},
        "data": {"train": [{"path": "/rows.jsonl"}]},
    }
    home = tmp_path / "prepared" / "rehearsals"
    home.mkdir(parents=True)
    (home / f"{key_of(recipe_from_dict(recipe), tiny_model)}.json").write_text("{}")
    make_old(tmp_path)
    if decided is not None:
        recipe["model"]["gradient_checkpointing"] = decided  # type: ignore[index]
    stored_run(tmp_path, "run", recipe=recipe)
    assert names(plan_clean(Folder(str(tmp_path)), DAY)) == []


def test_no_such_run(tmp_path: Path) -> None:
    stored_run(tmp_path, "my-run")
    with pytest.raises(InputError, match=r"no such run, .*did you mean my-run"):
        find_run("my-rnu", Folder(str(tmp_path)))
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    with pytest.raises(InputError, match=r"sweep is a sweep, not a run; name one of its trials"):
        find_run("sweep", Folder(str(tmp_path)))
    (tmp_path / "prepared").mkdir()
    with pytest.raises(InputError, match="finray runs lists them"):
        find_run("prepard", Folder(str(tmp_path)))


def test_what_is_no_number_is_never_among_the_best(tmp_path: Path) -> None:
    """NaN compares with nothing: sorted by it, a bad run could stay in place of the best."""
    values: list[Any] = [float("nan"), 0.9, float("nan"), 0.1, "x", None]
    for name, value in zip("abcdef", values, strict=True):
        stored_run(tmp_path, name, metrics={"eval_loss": value})
    how: dict[str, Any] = {"by": "eval_loss", "older_than": None, "unfinished": False}
    removal = plan_prune(Folder(str(tmp_path)), keep_best=1, **how)
    assert names(removal) == ["a", "b", "c", "e", "f"]
