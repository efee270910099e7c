"""Results taken elsewhere: exported by the real command, loaded where finray cannot be imported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.alone import loads_alone, run_alone, run_each_alone
from support.finished_run import finished_run
from support.harness import Finray, wait_until
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IDS = [5, 6, 7, 8, 9, 10]


def program_of(folder: Path) -> str:
    """The Python of a model card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return text.partition("```python\n")[2].partition("\n```")[0]


def test_a_trained_adapter_and_its_merge(finray: Finray, tmp_path_factory: Any) -> None:
    finray.run("train", finray.recipe(data__holdout=0.05))
    run, scratch = finray.folder / "runs" / "run", tmp_path_factory.mktemp("scratch")
    output = finray.run("export", "runs/run", "--to", "alone")
    assert "the adapter alone" in output and "PeftModel.from_pretrained(base, " in output
    output = finray.run("export", "runs/run", "--to", "whole", "--merge")
    assert "merged into its base" in output and "Traceback" not in output
    places = (run / "adapter", finray.folder / "alone", finray.folder / "whole")
    trained, alone, whole, base = loads_alone(*places, finray.model, ids=IDS, scratch=scratch)
    assert np.array_equal(trained, alone)
    assert np.abs(alone - whole).max() < 1e-4 * alone.std()
    assert np.abs(alone - base).max() > alone.std()
    assert "held-out loss" in (finray.folder / "whole" / "README.md").read_text(encoding="utf-8")
    assert "exists already" in finray.run("export", "runs/run", "--to", "whole", code=2)


def test_a_model_trained_whole(finray: Finray, tmp_path: Path) -> None:
    finray.run("train", finray.recipe(adapter=None, optim__max_steps=4))
    result = json.loads(finray.run("export", "runs/run", "--to", "out", "--json"))
    assert result["kind"] == "model" and result["folder"] == str(finray.folder / "out")
    run_alone(program_of(finray.folder / "out"), folder=finray.folder / "out")
    output = finray.run("export", "runs/run", "--to", "other", "--merge", code=2)
    assert "omit --merge" in output


def test_a_reward_model(finray: Finray, tmp_path_factory: Any) -> None:
    """An adapter with a score head, beside its base and merged into it."""
    finished_run(finray.folder, finray.model, "score")
    scratch = tmp_path_factory.mktemp("scratch")
    finray.run("export", "runs/support", "--to", "alone")
    finray.run("export", "runs/support", "--to", "whole", "--merge")
    places = [finray.folder / name for name in ("alone", "whole")]
    programs = {place: program_of(place) for place in places}
    apart, whole = loads_alone(*places, ids=IDS, scratch=scratch, then=programs)
    assert apart.shape == whole.shape == (1, 1)
    assert np.abs(apart - whole).max() < 1e-5


def test_an_adapter_over_nf4(finray: Finray) -> None:
    """Of widths that bitsandbytes' kernels take."""
    base = finray.folder / "base"
    config = LlamaConfig.from_pretrained(
        finray.model, hidden_size=128, intermediate_size=128, head_dim=32, num_key_value_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(finray.model).save_pretrained(base)
    finished_run(finray.folder, base, quantize="nf4")
    finray.run("export", "runs/support", "--to", "alone")
    finray.run("export", "runs/support", "--to", "whole", "--merge")
    places = {name: finray.folder / name for name in ("alone", "whole")}
    alone, whole = (program_of(place) for place in places.values())
    assert 'bnb_4bit_quant_type="nf4"' in alone and "BitsAndBytes" not in whole
    run_each_alone({places["alone"]: alone, places["whole"]: whole})


def test_kill_in_the_middle(finray: Finray) -> None:
    finished_run(finray.folder, finray.model)
    partial = finray.folder / ".out.partial"
    command = finray.start("export", "runs/support", "--to", "out", "--merge")
    wait_until(partial.exists, "an export under way", brief=True)
    command.kill()
    assert partial.exists() and not (finray.folder / "out").exists()
    finray.run("export", "runs/support", "--to", "out", "--merge")
    assert (finray.folder / "out" / "model.safetensors").exists()
    assert not partial.exists()


@pytest.mark.parametrize("arguments", [("nowhere",), ("runs/support", "--dtype", "bfloat16")])
def test_refusals(finray: Finray, arguments: tuple[str, ...]) -> None:
    finished_run(finray.folder, finray.model)
    output = finray.run("export", *arguments, "--to", "out", code=2)
    assert output.startswith("finray: ") and "Traceback" not in output
    assert not (finray.folder / "out").exists()
