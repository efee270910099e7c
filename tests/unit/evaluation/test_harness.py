"""Tasks of lm-evaluation-harness: without it, with results as it writes them, and with itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import finray
from finray.cluster.screens.answers import render_evaluation
from finray.training.common.errors import InputError
from finray.training.evaluation.evaluate import Evaluation
from finray.training.evaluation.harness import measures_of

pytestmark = pytest.mark.filterwarnings("ignore")
Write = Callable[[Path, list[Any]], Path]
TASK = """\
task: foxes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" fox", " lazy dog"]
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_an_absent_package_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finray.cluster.api.evaluation.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--tasks: .*; install it: pip install 'finray\[harness"):
        finray.evaluate(run, tasks=["arc_easy"])
    with pytest.raises(InputError, match="in this process; leave out --workers"):
        finray.evaluate(run, tasks=["arc_easy"], workers=2)
    monkeypatch.setattr("finray.cluster.api.evaluation.find_spec", lambda name: object())
    with pytest.raises(InputError, match=r"has no data\.eval of its own"):
        finray.evaluate(run, metrics=["exact_match"], tasks=["arc_easy"])


def test_tasks_are_measured_here_though_a_variable_names_a_cluster(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(candidates: Any, *_: Any) -> Evaluation:
        assert not next(candidates["answer"].open().model.parameters()).is_meta
        return Evaluation({"measures": []}, [])

    monkeypatch.setattr("finray.cluster.api.evaluation.find_spec", lambda name: object())
    monkeypatch.setattr("finray.training.evaluation.results.write_evaluation", measured)
    monkeypatch.setenv("FINRAY_ADDRESS", "127.0.0.1:1")
    finray.evaluate(run, tasks=["arc_easy"], to=tmp_path / "eval", quiet=True)


def test_its_results_become_measures() -> None:
    results = {
        "results": {
            "arc_easy": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.25},
            "wiki": {"word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
            "gsm8k": {"exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": 0.0},
        },
        "higher_is_better": {"arc_easy": {"acc": True}, "wiki": {"word_perplexity": False}},
        "n-samples": {"arc_easy": {"original": 9, "effective": 4}},
    }
    first, second, third = measures_of(results)
    assert first == {
        "name": "arc_easy acc",
        "value": 0.5,
        "interval": 0.49,
        "count": 4,
        "mode": "max",
    }
    assert second["name"] == "wiki word_perplexity"
    assert second["mode"] == "min" and second["interval"] is None
    assert third["name"] == "gsm8k exact_match strict-match" and third["value"] == 0.0


def test_a_task_of_its_own(run: Path, tiny_model: Path, tmp_path: Path, write: Write) -> None:
    """The accuracy is that of the choices' likelihoods, computed with PEFT alone."""
    pytest.importorskip("lm_eval")
    rows = [{"question": f"the quick {n} brown", "label": n % 2} for n in range(7)]
    data = write(tmp_path / "rows.jsonl", rows)
    task = tmp_path / "foxes.yaml"
    task.write_text(TASK.format(data=data), encoding="utf-8")
    with pytest.raises(InputError, match=r"--tasks: no_such_task: .*`lm-eval ls tasks`"):
        finray.evaluate(run, tasks=["no_such_task"], to=tmp_path / "eval")
    result = finray.evaluate(run, tasks=[str(task)], base=True, to=tmp_path / "eval")
    assert not result.problems
    (measure,) = result.record["measures"]
    assert measure["name"] == "foxes acc" and measure["count"] == 7
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def accuracy(model: Any) -> float:
        right = 0
        for row in rows:
            shares = []
            for choice in (" fox", " lazy dog"):
                prompt = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
                ids = tokenizer(row["question"] + choice, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    logits = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
                taken = logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
                shares.append(float(taken[len(prompt) - 1 :].sum()))
            right += int(shares[1] > shares[0]) == row["label"]
        return right / len(rows)

    assert measure["values"]["base"] == pytest.approx(accuracy(base))
    assert measure["values"]["answer"] == pytest.approx(
        accuracy(PeftModel.from_pretrained(base, run / "adapter"))
    )
    assert "foxes acc" in (tmp_path / "eval" / "eval.html").read_text()
    assert "foxes acc" in render_evaluation(result.record, str(tmp_path), as_json=False)
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["rows"] == 0
