"""GRPO and RLOO by the real command: kills, workers, and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.harness import Finray, assert_same_result, metrics, reached, record, wait_until

REWARDS = '''
import re


def length(prompts, completions, completion_ids, reference, **columns):
    """Short answers are good; a few are not judged."""
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    assert all(text.startswith("After ") for text in reference)
    return [None if ids[0] % 13 == 0 else -len(ids) / 10 for ids in completion_ids]


def fails(prompts, completions, **columns):
    """On a prompt now and then, which one of the workers has."""
    if any("7?" in prompt[-1]["content"] for prompt in prompts):
        raise RuntimeError("this prompt I do not like")
    return [1.0] * len(prompts)


def backtracks(prompts, completions, **columns):
    """Holds Python's lock, and never returns."""
    return [float(bool(re.match(r"(a|a)+$", "a" * 64 + "b"))) for _ in prompts]
'''


def recipe(finray: Finray, **changes: Any) -> Path:
    """12 steps of four prompts with four completions each."""
    (finray.folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    method = {
        "kind": "grpo",
        "rewards": [{"file": "rewards.py:length"}],
        "generations": 4,
        "max_completion": 16,
        "beta": 0.05,
        **changes.pop("method", {}),
    }
    settings = {
        "method": method,
        "data__max_length": 96,
        "data__holdout": 0.05,
        "optim__batch_size": 16,
        "optim__micro_batch_size": 4,
        "optim__max_steps": 12,
        "checkpoint__every_steps": 2,
        **changes,
    }
    path = finray.recipe(**settings)
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    del values["data"]["packing"]
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("method", [{"passes": 2}, {"kind": "rloo", "passes": 2}], ids=str)
def test_killed_and_resumed(finray: Finray, method: dict[str, Any]) -> None:
    """Bit for bit, in the middle of two passes over the same completions."""
    runs = finray.folder / "runs"
    finray.run("train", recipe(finray, method=method, name="whole"))
    path = recipe(finray, method=method, name="killed")
    command = finray.start("train", path)
    wait_until(lambda: reached(runs / "killed", 7), "step 7")
    command.kill()
    finray.run("train", path)
    run = record(runs / "killed")
    assert run["status"] == "finished" and run["restarts"][0]["step"] in (6, 8, 10)
    assert_same_result(runs / "killed", runs / "whole")
    digest = hashlib.sha256(REWARDS.encode()).hexdigest()
    assert run["reward_files"] == {f"{finray.folder}/rewards.py:length": digest}
    names = ("reward", "kl", "clipped", "completion_length", "truncated", "reward/length")
    steps = [line for line in metrics(runs / "whole") if "loss" in line]
    assert all(name in line for line in steps for name in names)
    assert {"eval_reward", "eval_kl"} <= run["metrics"].keys()
    assert run["before"]["eval_kl"] == 0.0 < run["metrics"]["eval_kl"]
    shown = [
        (runs / name / "rollouts.jsonl").read_text(encoding="utf-8") for name in ("whole", "killed")
    ]
    assert shown[0] == shown[1]
    first = json.loads(shown[0].splitlines()[0])
    assert first.keys() == {"step", "prompt", "completion", "reward", "rewards", "advantage"}


def test_two_workers_sample_what_one_process_does(finray: Finray) -> None:
    runs = finray.folder / "runs"
    changes = {"adapter__dropout": 0.0, "optim__max_steps": 2}
    finray.run("train", recipe(finray, name="one", **changes))
    finray.run("train", recipe(finray, name="two", scale__workers=2, **changes))
    one, two = (
        [line for line in metrics(runs / name) if "loss" in line] for name in ("one", "two")
    )
    assert record(runs / "two")["world_sizes"] == [2]
    for name in ("reward", "reward_std", "completion_length", "loss", "grad_norm"):
        assert two[0][name] == pytest.approx(one[0][name], abs=1e-4), name
    # A failure of one worker ends both, and is reported.
    path = recipe(
        finray, name="bad", scale__workers=2, method={"rewards": [{"file": "rewards.py:fails"}]}
    )
    output = finray.run("train", path, code=1)
    for part in ("RuntimeError: this prompt I do not like", "rewards.py", "What comes after"):
        assert part in output
    assert "this prompt I do not like" in record(runs / "bad")["error"]


def test_a_reward_that_never_returns(finray: Finray) -> None:
    method = {"rewards": [{"file": "rewards.py:backtracks"}]}
    scale = {"scale__workers": 2, "scale__hang_timeout": 2, "scale__max_failures": 0}
    path = recipe(finray, method=method, data__holdout=0.0, **scale)
    output = finray.run("train", path, code=1)
    assert "sampling and scoring for step 1 did not end within 12 s" in output
    run = finray.folder / "runs" / "run"
    stacks = "".join(path.read_text("utf-8") for path in (run / "stacks").iterdir())
    assert 'rewards.py", line' in stacks and " in backtracks" in stacks
    assert record(run)["status"] == "failed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__batch_size": 18}, "multiple of method.generations 4"),
        ({"method": {"max_completion": 96}}, "leaves no tokens for prompts"),
        ({"method": {"passes": 4}}, "checkpoint.every_steps 2 must be a multiple"),
        ({"method": {"rewards": [{"file": "rewards.py:nothing"}]}}, "no function 'nothing'"),
        ({"method": {"rewards": [{"weight": 1.0}]}}, "a reward is one of"),
        ({"method": {"rewards": [{"run": "missing"}]}}, "none of these folders exists"),
        ({"method": {"rollout": "vllm"}}, "vllm is not installed"),
    ],
)
def test_refused(finray: Finray, changes: dict[str, Any], message: str) -> None:
    output = finray.run("train", recipe(finray, **changes), code=2)
    assert message in output
    assert "Traceback" not in output
    assert not (finray.folder / "runs" / "run").exists()


def test_a_reward_run_must_fit(finray: Finray) -> None:
    """One of another method, and one of another tokenizer."""
    rewards = [{"run": "judge"}]
    judge = finray.folder / "runs" / "judge"
    (judge / "adapter").mkdir(parents=True)
    reward_run = {"method": "sft", "status": "finished", "result": "adapter", "base": "somewhere"}
    (judge / "run.json").write_text(json.dumps(reward_run), encoding="utf-8")
    (judge / "recipe.yaml").write_text("model: {base: somewhere}", encoding="utf-8")
    path = recipe(finray, method={"rewards": rewards})
    assert "is a run of method sft; expected reward" in finray.run("check", path, code=2)
    reward_run["method"] = "reward"
    (judge / "run.json").write_text(json.dumps(reward_run), encoding="utf-8")
    tokenizer = json.loads((finray.model / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["added_tokens"][0]["content"] = "<another>"
    (judge / "adapter" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "has another tokenizer than model.base" in finray.run("check", path, code=2)
