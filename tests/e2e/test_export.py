"""Results taken elsewhere: exported by the real command, loaded where finray cannot be imported."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.alone import loads_alone
from support.finished_run import finished_run
from support.harness import Finray, wait_until
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

# peft calls a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

IDS = [5, 6, 7, 8, 9, 10]
Logits = NDArray[np.float32]


def program_of(folder: Path) -> str:
    """The Python of a model card."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    return text.partition("```python\n")[2].partition("\n```")[0]


@pytest.fixture(scope="module")
def exported(shared_finray: Finray) -> Finray:
    """The command in a folder with exports of all kinds."""
    finray, folder = shared_finray, shared_finray.folder
    finray.run("train", finray.recipe(data__holdout=0.05))
    finray.run("train", finray.recipe(name="full", adapter=None, optim__max_steps=4))
    finished_run(folder, finray.model, "score", run_name="score")
    finished_run(folder, _base_of_nf4(finray), run_name="nf4", quantize="nf4")
    for name in ("run", "score", "nf4"):
        output = finray.run("export", f"runs/{name}", "--to", f"{name}-alone")
        assert "the adapter alone" in output and "PeftModel.from_pretrained(base, " in output
        output = finray.run("export", f"runs/{name}", "--to", f"{name}-whole", "--merge")
        assert "merged into its base" in output and "Traceback" not in output
    result = json.loads(finray.run("export", "runs/full", "--to", "full", "--json"))
    assert result["kind"] == "model" and result["folder"] == str(folder / "full")
    return finray


def _base_of_nf4(finray: Finray) -> Path:
    """A base of widths that bitsandbytes' kernels take."""
    base = finray.folder / "base"
    config = LlamaConfig.from_pretrained(
        finray.model, hidden_size=128, intermediate_size=128, head_dim=32, num_key_value_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(finray.model).save_pretrained(base)
    return base


@pytest.fixture(scope="module")
def logits(exported: Finray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Logits]:
    """By the export's name, from one process, which runs the programs of the cards too."""
    folder = exported.folder
    places = {
        "trained": folder / "runs" / "run" / "adapter",
        "base": exported.model,
        **{name: folder / name for name in ("run-alone", "run-whole")},
        **{name: folder / name for name in ("score-alone", "score-whole")},
    }
    names = ("full", "score-alone", "score-whole", "nf4-alone", "nf4-whole")
    programs = {folder / name: program_of(folder / name) for name in names}
    scratch = tmp_path_factory.mktemp("scratch")
    loaded = loads_alone(*places.values(), ids=IDS, scratch=scratch, then=programs)
    return dict(zip(places, loaded, strict=True))


def test_a_trained_adapter_and_its_merge(exported: Finray, logits: dict[str, Logits]) -> None:
    alone, whole = logits["run-alone"], logits["run-whole"]
    assert np.array_equal(logits["trained"], alone)
    assert np.abs(alone - whole).max() < 1e-4 * alone.std()
    assert np.abs(alone - logits["base"]).max() > alone.std()
    card = (exported.folder / "run-whole" / "README.md").read_text(encoding="utf-8")
    assert "held-out loss" in card
    output = exported.run("export", "runs/run", "--to", "run-whole", code=2)
    assert "exists already" in output


def test_a_model_trained_whole(exported: Finray, logits: dict[str, Logits]) -> None:
    """Its card's program has run."""
    output = exported.run("export", "runs/full", "--to", "other", "--merge", code=2)
    assert "omit --merge" in output


def test_a_reward_model(logits: dict[str, Logits]) -> None:
    """An adapter with a score head, beside its base and merged into it."""
    apart, whole = logits["score-alone"], logits["score-whole"]
    assert apart.shape == whole.shape == (1, 1)
    assert np.abs(apart - whole).max() < 1e-5


def test_an_adapter_over_nf4(exported: Finray, logits: dict[str, Logits]) -> None:
    """Its cards' programs have run."""
    alone, whole = (program_of(exported.folder / f"nf4-{how}") for how in ("alone", "whole"))
    assert 'bnb_4bit_quant_type="nf4"' in alone and "BitsAndBytes" not in whole


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
