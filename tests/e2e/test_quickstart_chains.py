"""The quickstart's chains, shortened: SFT, then DPO; SFT, then a reward model, then GRPO."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.harness import Finray, metrics, record

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"
HELD_OUT = 80
STEPS = 10


class Chain:
    """Runs of shipped recipes in one storage."""

    def __init__(self, finray: Finray) -> None:
        self.storage = finray.folder / "runs"
        self._finray = finray
        self.held_out = finray.folder / "eval.jsonl"
        with (QUICKSTART / "eval.jsonl").open(encoding="utf-8") as lines:
            self.held_out.write_text("".join(islice(lines, HELD_OUT)), encoding="utf-8")

    def train(self, recipe: str, name: str, **settings: Any) -> dict[str, Any]:
        """run.json of a run in this process; settings by dotted key with __ for the dot."""
        settings = {"storage": self.storage, "name": name, **settings}
        changes = [
            part
            for key, value in settings.items()
            for part in ("--set", f"{key.replace('__', '.')}={value}")
        ]
        self._finray.run("train", QUICKSTART / recipe, "--local", *changes)
        return record(self.storage / name)


@pytest.fixture(scope="module")
def chain(shared_finray: Finray) -> Iterator[Chain]:
    """With the start of both chains: a model that can half do the task."""
    made = Chain(shared_finray)
    made.train(
        "sft.yaml",
        "quickstart-start",
        optim__epochs="null",
        optim__max_steps=12,
        eval__every_steps="null",
        eval__samples=0,
    )
    yield made


@pytest.mark.slow
def test_dpo_prefers_what_is_right(chain: Chain) -> None:
    run = chain.train(
        "dpo.yaml", "quickstart-dpo", optim__epochs="null", optim__max_steps=20, eval__samples=0
    )
    assert run["before"]["eval_reward_margin"] == 0.0
    assert run["metrics"]["eval_reward_accuracy"] > 0.8
    assert run["metrics"]["eval_reward_margin"] > 0.5


@pytest.fixture(scope="module")
def judge(chain: Chain) -> dict[str, Any]:
    """run.json of the reward model, after one epoch of three."""
    return chain.train(
        "reward.yaml", "quickstart-reward", optim__epochs=1, eval__every_steps="null"
    )


def test_the_reward_model_learns(judge: dict[str, Any]) -> None:
    accuracy = "eval_reward_accuracy"
    assert judge["metrics"][accuracy] > max(0.55, judge["before"][accuracy] + 0.15)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_grpo_gains_what_the_rewards_ask_for(
    chain: Chain, judge: dict[str, Any], seed: int
) -> None:
    """On held-out messages, and without straying far from the start."""
    name = f"quickstart-grpo-{seed}"
    run = chain.train(
        "grpo.yaml",
        name,
        seed=seed,
        optim__max_steps=STEPS,
        data__eval=f"[{{path: {chain.held_out}}}]",
        eval__samples=0,
        eval__every_steps="null",
    )
    before, after = run["before"], run["metrics"]
    assert after["eval_reward"] > before["eval_reward"] + 0.4
    for reward in ("json_valid", "fields_right"):
        assert after[f"eval_reward/{reward}"] > before[f"eval_reward/{reward}"] + 0.2
    assert 0.0 == before["eval_kl"] < after["eval_kl"] < 0.2
    steps = [line for line in metrics(chain.storage / name) if "loss" in line]
    assert "reward/quickstart-reward" in steps[-1]
