"""Input errors of the command: exit code 2, one message, nothing started, no files left."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.stored_runs import stored_run

from finray.cluster.cli.main import main
from finray.cluster.jobs.client import Cluster, Job


class Runner:
    """Calls the command in this process and reads what it printed."""

    def __init__(self, folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.model = model
        self._capsys = capsys

    def recipe(self, **changes: Any) -> Path:
        values: dict[str, Any] = {
            "name": "run",
            "model": {"base": str(self.model)},
            "data": {"train": [{"path": "rows.jsonl"}], "max_length": 128},
            "scale": {"workers": 0},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                values.setdefault(section, {})[name] = value
            else:
                values[section] = value
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def rows(self, lines: list[str], name: str = "rows.jsonl") -> None:
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def __call__(self, *arguments: str | Path, code: int) -> str:
        exit_code = main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        assert exit_code == code, err
        assert "Traceback" not in err
        return err if code else out


CHAT = json.dumps(
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
)


@pytest.fixture
def finray(
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Runner:
    monkeypatch.chdir(tmp_path)
    runner = Runner(tmp_path, tiny_model, capsys)
    runner.rows([CHAT] * 64)
    return runner


@pytest.mark.parametrize("command", ["check", "train", "prepare"])
def test_a_misspelt_key(finray: Runner, command: str) -> None:
    output = finray(command, finray.recipe(optim__learnin_rate=1), code=2)
    assert "recipe.yaml:" in output and "did you mean 'learning_rate'?" in output
    assert not (finray.folder / "runs").exists()


def test_a_missing_and_an_empty_file(finray: Runner) -> None:
    path = finray.recipe(data__train=[{"path": "absent.jsonl"}])
    assert "absent.jsonl" in finray("train", path, code=2)
    (finray.folder / "empty.jsonl").write_bytes(b"")
    path = finray.recipe(data__train=[{"path": "empty.jsonl"}])
    assert "empty" in finray("train", path, code=2)


def test_rows_that_fit_no_format(finray: Runner) -> None:
    finray.rows(['{"colour": "red"}'] * 64)
    output = finray("train", finray.recipe(), code=2)
    assert "rows.jsonl:1" in output and "colour" in output and "messages" in output


def test_bad_rows_above_the_share(finray: Runner) -> None:
    finray.rows([CHAT] * 300 + ["{oops"] * 10)
    output = finray("train", finray.recipe(), code=2)
    assert "rows.jsonl:301" in output and "quarantine" in output


def test_a_model_without_tokenizer_or_template(finray: Runner) -> None:
    bare = finray.folder / "bare"
    bare.mkdir()
    shutil.copy(finray.model / "config.json", bare)
    assert "tokenizer" in finray("train", finray.recipe(model__base=str(bare)), code=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(finray.model / name, bare)
    output = finray("train", finray.recipe(model__base=str(bare)), code=2)
    assert "chat template" in output and "data.chat_template" in output


def test_max_length_beyond_the_model(finray: Runner) -> None:
    output = finray("train", finray.recipe(data__max_length=4096), code=2)
    assert "4096" in output and "128" in output


def test_fewer_rows_than_a_batch(finray: Runner) -> None:
    output = finray("train", finray.recipe(optim__batch_size=100), code=2)
    assert "batch_size" in output and "64" in output


def test_check_shows_what_a_run_would_do(finray: Runner) -> None:
    path = finray.recipe(adapter__rank=4, data__packing=False)
    outlook = json.loads(finray("check", path, "--json", code=0))
    assert outlook["steps"] == 2 and outlook["sources"][0]["rows"] == 64
    assert 0 < outlook["parameters"]["trainable"] < outlook["parameters"]["total"]
    output = finray("check", path, code=0)
    assert "64 rows of messages" in output and "MiB of a GPU: weights" in output
    assert outlook["adapted"]["all"]["parameters"] == outlook["parameters"]["trainable"]
    assert "attention 8 of 8, dense MLP 6 of 6; not head (100.0% of the layers' values)" in output


def test_check_looks_at_the_cluster_of_the_environment(
    finray: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a token nothing is connected to, and the message names the cluster."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(finray.folder / "absent"))
    monkeypatch.setenv("FINRAY_ADDRESS", "head:6379")
    recipe = finray.recipe(scale__workers=1, optim__batch_size=4)
    output = finray("check", recipe, "--quiet", code=2)
    assert output.startswith("finray: the cluster at head:6379 requires a token")
    monkeypatch.setenv("FINRAY_ADDRESS", "http://head:8265")
    assert "recipe OK" in finray("check", recipe, code=0)


def test_quiet_prints_only_the_result_and_errors(
    finray: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = {}
    for name in ("loud", "quiet"):
        path, options = finray.recipe(storage=name), ["--quiet"] * (name == "quiet")
        assert main(["prepare", str(path), *options]) == 0
        printed[name] = capsys.readouterr()
    assert "preparing data" in printed["loud"].err and not printed["quiet"].err
    assert printed["quiet"].out == printed["loud"].out.replace("/loud/", "/quiet/")
    missing = finray.recipe(data__train=[{"path": "absent.jsonl"}])
    assert "absent.jsonl" in finray("--quiet", "prepare", missing, code=2)


def test_a_submission_is_quiet_and_passes_the_log_level_on(
    finray: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entries: list[str] = []
    job = Job("run", "run", "/shared", "0", "PENDING", "", None, 0)
    monkeypatch.setattr(Cluster, "__init__", lambda _, address: None)
    monkeypatch.setattr(Cluster, "_last", lambda _, run: None)
    monkeypatch.setattr(Cluster, "_start", lambda _, id, what, *rest: entries.append(what))
    monkeypatch.setattr(Cluster, "job", lambda _, name: job)
    words = ["job", "submit", str(finray.recipe(scale__workers=1, storage="/shared"))]
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main([*words, "--log-level", "debug"]) == 0
    out, err = capsys.readouterr()
    assert out == "run PENDING\n" and "submitted run" in err and "uploaded" in err
    assert main([*words, "--quiet"]) == 0
    assert capsys.readouterr() == ("run PENDING\n", "")
    assert entries == ["train --wait-for-nodes 0 --log-level debug", "train --wait-for-nodes 0"]


def test_prepare_then_check_is_exact(finray: Runner) -> None:
    path = finray.recipe(optim__batch_size=8)
    summary = json.loads(finray("prepare", path, "--json", code=0))
    outlook = json.loads(finray("check", path, "--json", code=0))
    assert outlook["data"]["is_exact"]
    assert outlook["data"]["tokens"] == summary["train"]["tokens"]


@pytest.mark.parametrize("command", ["check", "train"])
def test_names_of_modules_that_match_nothing(finray: Runner, command: str) -> None:
    output = finray(command, finray.recipe(adapter__targets=["q_prj"]), code=2)
    assert "'q_prj' matches no module" in output and "q_proj" in output
    output = finray(command, finray.recipe(freeze__train=["q_prj"]), code=2)
    assert "'q_prj' matches no parameter" in output and "q_proj" in output
    assert not list(finray.folder.glob("runs/*")), "data was prepared first"


def test_schema_documents_every_setting(finray: Runner) -> None:
    sweep = json.loads(finray("schema", "sweep", code=0))
    assert "population" in sweep["$defs"]["Pruning"]["properties"]["kind"]["description"]
    schema = json.loads(finray("schema", code=0))
    rank = schema["$defs"]["LoraAdapter"]["properties"]["rank"]
    assert rank["description"] == "Rank of the update."


def test_report_of_no_run(finray: Runner) -> None:
    assert "'nowhere': no such run" in finray("report", "nowhere", code=2)


def test_export_of_no_run(finray: Runner) -> None:
    assert "'nowhere': no such run" in finray("export", "nowhere", "--to", "out", code=2)
    assert not (finray.folder / "out").exists()


def test_a_run_is_named_as_other_commands_name_it(finray: Runner) -> None:
    stored_run(finray.folder / "runs", "first", status="stopped")
    assert "first: the run is not finished" in finray("export", "first", "--to", "out", code=2)
    assert finray("report", "first", code=0).endswith("runs/first/report.html\n")


def write_sweep(finray: Runner, **settings: Any) -> Path:
    path = finray.folder / "sweep.yaml"
    recipe = str(finray.recipe(data__holdout=0.1))
    path.write_text(yaml.safe_dump({"name": "s", "recipe": recipe, **settings}), encoding="utf-8")
    return path


def test_tune_refuses_before_it_starts_anything(finray: Runner) -> None:
    sweep = write_sweep(finray, search={"optim.learning_rates": {"choice": [1]}})
    output = finray("tune", sweep, code=2)
    assert "did you mean 'learning_rate'" in output and "sweep.yaml" in output
    output = finray("tune", write_sweep(finray, recipe="nowhere.yaml"), code=2)
    assert "nowhere.yaml does not exist" in output
    assert "stop_when.tokenz" in finray(
        "tune", write_sweep(finray), "--stop-when", "tokenz=1", code=2
    )
    assert "expected SWEEP" in finray("tune", "show", "a", "b", code=2)
    assert "holds no sweep" in finray("tune", "show", "nowhere", code=2)
    assert not (finray.folder / "runs").exists()


def test_a_sweep_does_not_take_a_runs_folder(finray: Runner) -> None:
    run = finray.folder / "runs" / "s"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}", encoding="utf-8")
    assert "holds a run, not a sweep" in finray("tune", write_sweep(finray), code=2)
    (run / "run.json").unlink()
    other = {"status": "running", "settings": {"search": {"optim.beta1": {}}}}
    (run / "sweep.json").write_text(json.dumps(other), encoding="utf-8")
    assert "holds a sweep with other settings" in finray("tune", write_sweep(finray), code=2)


def test_a_sweep_whose_storage_is_a_file_starts_nothing(
    finray: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finray.cluster.api.sweeps.prepare_early", None)
    (finray.folder / "full").write_text("", encoding="utf-8")
    output = finray("tune", write_sweep(finray), "--set", "storage=full", code=2)
    assert "--set storage=full: storage: " in output and "a folder" in output


@pytest.mark.long
def test_check_takes_a_sweep(finray: Runner) -> None:
    search = {
        "adapter.rank": {"choice": [2, 4]},
        "optim.batch_size": {"choice": [2, 4]},
        "optim.micro_batch_size": {"choice": [2, 4]},
    }
    sweep = write_sweep(finray, search=search, trials=5, sampler="grid")
    finray.rows([CHAT.replace('"a"', f'"{number}"') for number in range(400)])
    overrides = ("--set", "recipe.adapter={rank: 2}")
    output = finray("check", sweep, *overrides, code=0)
    assert output.startswith("sweep OK\n")
    assert "at most 5 of 6 valid settings, chosen by grid" in output
    assert "eval_loss (min)" in output
    outlook = json.loads(finray("check", sweep, *overrides, "--json", code=0))
    assert outlook["folder"] == str(finray.folder / "runs" / "s")
    assert outlook["sweep"]["settings"] == 6 and outlook["steps"] > 0
    output = finray("check", sweep, *overrides, "--set", "objective=exact_match", code=2)
    assert "--set objective=exact_match: objective:" in output and "eval.samples" in output


def test_kubernetes_does_not_take_a_sweep(finray: Runner) -> None:
    recipe = finray.recipe()
    path = finray.folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "recipe": str(recipe)}), encoding="utf-8")
    assert "finray job submit" in finray("k8s", "render", path, code=2)


def test_more_gpus_than_there_are(finray: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker starts and no GPU is used."""
    monkeypatch.setattr("finray.cluster.launcher.usable_gpus", lambda: 1)
    output = finray("train", finray.recipe(scale__workers=2), code=2)
    assert "lacks 1 GPUs; scale.workers=1 would fit" in output
    assert not (finray.folder / "runs").exists()
