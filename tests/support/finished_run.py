"""A finished run, made by hand: what `finray export` reads of a run's folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer

from finray.training.config.base_digest import write_base
from finray.training.config.models import ModelSettings
from finray.training.models.composite import auto_class, towers, towers_pattern

RECORD: dict[str, Any] = {
    "status": "finished",
    "name": "support",
    "method": "sft",
    "step": 60,
    "total_steps": 60,
    "tokens": 12345,
    "dtype": "float32",
    "before": {"eval_loss": 2.5, "exact_match": 0.0},
    "metrics": {"loss": 0.5, "eval_loss": 0.75, "exact_match": 0.875},
    "versions": {"finray": "0.1.0", "torch": "2.13.0"},
    "data": {
        "rows_read": 240,
        "dropped": {"too long": 3},
        "train": {"sequences": 200, "tokens": 12000, "trainable_tokens": 9000, "fill": 0.9},
        "sources": [{"path": "/home/ada/secret/chat.jsonl", "rows": 240, "format": "messages"}],
    },
}


def finished_run(
    folder: Path,
    base: Path,
    what: str = "adapter",
    name: str | None = None,
    run_name: str = "support",
    **model: Any,
) -> Path:
    """A run in <folder>/runs, with random weights.

    Args:
        folder: where to.
        base: folder of the base model.
        what: adapter, score (an adapter with a score head) or model.
        name: hub id by which the recipe calls the base, instead of its folder.
        run_name: the run's name.
        model: further settings of the recipe's model.
    """
    torch.manual_seed(0)
    run = folder / "runs" / run_name
    run.mkdir(parents=True)
    result = "model" if what == "model" else "adapter"
    method = "reward" if what == "score" else "sft"
    recipe = {
        "name": run_name,
        "model": {"base": name or str(base), "revision": None, **model},
        "adapter": {"kind": "lora", "rank": 4} if result == "adapter" else None,
        "method": {"kind": method},
        "data": {
            "train": [
                {"path": "/home/ada/secret/chat.jsonl"},
                {"path": "s3://key:swordfish@bucket/rows.jsonl?endpoint_override=10.0.0.7"},
            ]
        },
        "storage": "/home/ada/secret/runs",
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    own = {"name": run_name, "method": method, "result": result, "base": name or str(base)}
    record = {**RECORD, **own}
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    if what == "model":
        shutil.copytree(base, run / "model")
    else:
        _write_adapter(base, run / "adapter", what == "score")
        write_base(ModelSettings(base=name or str(base)), run / "adapter")
    return run


def _write_adapter(base: Path, folder: Path, scores: bool) -> None:
    config = AutoConfig.from_pretrained(base)
    make = auto_class(config, "score" if scores else "causal", "base")
    task = "SEQ_CLS" if scores else "CAUSAL_LM"
    model = make.from_pretrained(base, **({"num_labels": 1} if scores else {}))
    outside = towers_pattern(towers(model))
    config = LoraConfig(task_type=task, r=4, target_modules="all-linear", exclude_modules=outside)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
