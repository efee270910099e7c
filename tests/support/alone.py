"""Results loaded by transformers and PEFT alone, in processes where finray cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WITHOUT_FINRAY = """
import sys, warnings

class NoFinray:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "finray":
            raise ImportError("finray is not to be imported here")

sys.meta_path.insert(0, NoFinray())
"""

_LOGITS = """
import json
import numpy as np
import torch
import transformers
from peft import PeftModel

ids, dtype, out, results = json.loads(sys.argv[1])
logits = []
for result in results:
    transformers.AutoTokenizer.from_pretrained(result["folder"])
    make = getattr(transformers, result["class"])
    model = make.from_pretrained(result["whole"], dtype=dtype, **result["more"])
    if result["whole"] != result["folder"]:
        model = PeftModel.from_pretrained(model, result["folder"])
    with torch.no_grad():
        logits.append(model.eval()(input_ids=torch.tensor([ids])).logits.float().numpy())
np.savez(out, *logits)
"""


_EACH = """
import json, os
for program, folder in json.loads(sys.argv[-1]):
    os.chdir(folder)
    exec(program, {"__name__": "__main__"})
"""


def _as_argument(programs: dict[Path, str]) -> str:
    return json.dumps([[program, str(folder)] for folder, program in programs.items()])


def run_alone(program: str, *arguments: str, folder: Path) -> str:
    """Run Python in a folder, without finray; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_FINRAY + program, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loads_alone(
    *folders: Path,
    ids: list[int],
    scratch: Path,
    dtype: str = "auto",
    then: dict[Path, str] | None = None,
) -> list[NDArray[np.float32]]:
    """Logits that results compute when transformers and PEFT load them, by themselves.

    Args:
        folders: adapter/, model/ or exports of causal models and of sequence classifiers; under an
            adapter the base is loaded that its configuration names.
        ids: one text's tokens.
        scratch: where the logits are put down.
        dtype: type in which the (base) model's weights are loaded.
        then: programs that the same process runs afterwards, by their folder.
    """
    out = scratch / "logits.npz"
    inputs = json.dumps([ids, dtype, str(out), [_how_to_load(folder) for folder in folders]])
    run_alone(_LOGITS + _EACH, inputs, _as_argument(then or {}), folder=scratch)
    with np.load(out) as saved:
        return [saved[name] for name in saved.files]


def _how_to_load(folder: Path) -> dict[str, Any]:
    whole, more = str(folder), {}
    if (folder / "adapter_config.json").exists():
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        whole, scores = config["base_model_name_or_path"], config["task_type"] == "SEQ_CLS"
        more = {"num_labels": 1} if scores else {}
    else:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        scores = config["architectures"][0].endswith("ForSequenceClassification")
    kind = "SequenceClassification" if scores else "CausalLM"
    return {"folder": str(folder), "whole": whole, "class": f"AutoModelFor{kind}", "more": more}
