"""Results loaded by transformers and PEFT alone, in processes where finray cannot be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

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

told = json.loads(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(told["folder"])
make = getattr(transformers, told["class"])
model = make.from_pretrained(told["base"] or told["folder"], dtype=told["dtype"], **told["more"])
if told["base"]:
    model = PeftModel.from_pretrained(model, told["folder"])
model.eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor([told["ids"]])).logits
np.save(told["out"], logits.float().numpy())
"""


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
    folder: Path, ids: list[int], scratch: Path, dtype: str = "auto", **more: object
) -> NDArray[np.float32]:
    """Logits that a result computes when transformers and PEFT load it, by themselves.

    Args:
        folder: adapter/, model/ or an export; for an adapter, the base that its configuration
            names is loaded under it. Causal models and sequence classifiers.
        ids: one text's tokens.
        scratch: where the logits are put down.
        dtype: type in which the (base) model's weights are loaded.
        more: arguments for the (base) model's `from_pretrained`.
    """
    config = folder / "adapter_config.json"
    base = ""
    if config.exists():
        told = json.loads(config.read_text(encoding="utf-8"))
        base, is_classifier = told["base_model_name_or_path"], told["task_type"] == "SEQ_CLS"
        if is_classifier:
            more.setdefault("num_labels", 1)
    else:
        told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        is_classifier = told["architectures"][0].endswith("ForSequenceClassification")
    kind = "SequenceClassification" if is_classifier else "CausalLM"
    out = scratch / f"logits-{len(list(scratch.iterdir()))}.npy"
    what = {
        "folder": str(folder),
        "base": base,
        "class": f"AutoModelFor{kind}",
        "ids": ids,
        "dtype": dtype,
        "more": more,
        "out": str(out),
    }
    run_alone(_LOGITS, json.dumps(what), folder=scratch)
    logits: NDArray[np.float32] = np.load(out)
    return logits
