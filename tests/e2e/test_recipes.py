"""Every shipped recipe, run by the real command."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.harness import Finray, losses, metrics, record

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "quickstart"

LOADS_ALONE = """
import json, sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, samples = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
model = PeftModel.from_pretrained(model, adapter)
sample = json.loads(open(samples, encoding="utf-8").readline())
ids = tokenizer(sample["prompt"], add_special_tokens=False, return_tensors="pt")
eos = tokenizer.eos_token_id
out = model.generate(**ids, max_new_tokens=128, do_sample=False, eos_token_id=eos)
text = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
assert text.strip() == sample["after"].strip(), (text, sample["after"])
assert not [name for name in sys.modules if name.startswith("finray")]
"""


def few(folder: Path) -> Path:
    """The first 40 held-out messages."""
    lines = (QUICKSTART / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path = folder / "eval.jsonl"
    path.write_text("".join(lines[:40]), encoding="utf-8")
    return path


def test_quickstart(finray: Finray) -> None:
    """The main job with two thirds of its steps: two workers, and what the README promises."""
    storage = finray.folder / "runs"
    output = finray.run(
        *("train", QUICKSTART / "sft.yaml", "--set", f"storage={storage}"),
        *("--set", "optim.epochs=null", "--set", "optim.max_steps=48"),
        *("--set", "eval.every_steps=null", "--set", f"data.eval=[{{path: {few(finray.folder)}}}]"),
        fresh=True,
    )
    run = storage / "quickstart"
    run_record = record(run)
    assert run_record["status"] == "finished" and run_record["world_sizes"] == [2]
    assert run_record["before"]["exact_match"] < 0.10
    assert run_record["metrics"]["exact_match"] >= 0.80
    assert run_record["metrics"]["eval_loss"] < run_record["before"]["eval_loss"]
    for shown in ("exact match", "held-out loss", "adapter", "report.html"):
        assert shown in output
    done = subprocess.run(
        [
            *(sys.executable, "-c", LOADS_ALONE),
            *(str(QUICKSTART / "base"), str(run / "adapter"), str(run / "samples.jsonl")),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr


def test_held_out_messages_never_occur_in_training() -> None:
    def contents(name: str, role: str) -> list[str]:
        lines = (QUICKSTART / name).read_text(encoding="utf-8").splitlines()
        turns = [turn for line in lines for turn in json.loads(line)["messages"]]
        return [turn["content"] for turn in turns if turn["role"] == role]

    train, held_out = contents("train.jsonl", "user"), contents("eval.jsonl", "user")
    assert len(train) > 1000 and len(held_out) >= 100
    assert not set(train) & set(held_out)
    names = {json.loads(answer)["name"] for answer in contents("train.jsonl", "assistant")}
    fresh = [json.loads(answer)["name"] for answer in contents("eval.jsonl", "assistant")]
    assert not names & set(fresh)


@pytest.mark.slow
def test_the_base_model_can_be_made(finray: Finray) -> None:
    """The steps of the quickstart's README, on a small corpus and for a few steps."""
    folder = finray.folder / "quickstart"
    folder.mkdir()
    shutil.copy(QUICKSTART / "base.yaml", folder)
    for script, arguments in (
        ("make_data.py", ("--corpus", "corpus.jsonl", "--rows", "600")),
        ("make_tokenizer.py", ("--corpus", "corpus.jsonl", "--out", "skeleton")),
    ):
        command = [sys.executable, str(QUICKSTART / script), *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=180)
    finray.run(
        *("train", folder / "base.yaml", "--set", "optim.max_steps=30"),
        *("--set", "log.every_steps=5", "--set", "eval.every_steps=15"),
    )
    run = finray.folder / "runs" / "quickstart-base"
    logged = losses(run)
    assert logged[30] < logged[5] - 1.0
    assert [line["step"] for line in metrics(run) if "eval_loss" in line] == [0, 15, 30]
    assert (run / "model" / "model.safetensors").exists()
    assert (run / "model" / "tokenizer.json").exists()
