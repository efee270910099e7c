"""A mixture of experts in 4 bits, by the real command: learnt, killed, gone on, merged."""

import json
import shutil
from pathlib import Path

import pytest
from support.harness import Finray, assert_same_result, losses, metrics, reached, record, wait_until
from support.mixtures import mixture
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-MoE with the tokenizer of the other tests."""
    folder = tmp_path_factory.mktemp("mixture")
    mixture("qwen2_moe", vocab_size=300).save_pretrained(folder)
    for file in tiny_model.glob("*token*"):
        shutil.copy(file, folder)
    for file in tiny_model.glob("chat_template*"):
        shutil.copy(file, folder)
    return folder


def test_experts_in_4_bits(finray: Finray, base: Path) -> None:
    settings = {
        "model__base": str(base),
        "model__quantize": "nf4",
        "data__holdout": 0.1,
        "adapter__dropout": 0.0,
    }
    whole = finray.recipe(name="whole", **settings)
    finray.run("train", whole, "--local")
    run = finray.folder / "runs" / "whole"
    logged = losses(run)
    assert logged[30] < logged[1] - 0.2
    adapted = record(run)["adapted"]
    assert adapted["experts"]["modules"] == adapted["experts"]["of"] == 4
    assert adapted == json.loads(finray.run("check", whole, "--json", "--fresh"))["adapted"]
    measured = [line for line in metrics(run) if "loss" in line]
    assert all(line["expert_load"] >= 1 and 0 <= line["idle_experts"] < 1 for line in measured)
    assert "experts 4 of 4" in (run / "report.html").read_text(encoding="utf-8")

    killed, other = finray.recipe(name="killed", **settings), finray.folder / "runs" / "killed"
    command = finray.start("train", killed, "--local")
    wait_until(lambda: reached(other, 17), "step 17")
    command.kill()
    assert "resumed from" in finray.run("train", killed, "--local")
    assert_same_result(other, run)

    target = finray.folder / "merged"
    finray.run("export", str(run), "--to", str(target), "--merge")
    _, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
