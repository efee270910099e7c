"""How each kind of model keeps packed documents apart, and which cannot."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.forking import ForkServer

from finray.training.config.recipe import recipe_from_dict
from finray.training.rehearsal.outcome import Outcome

# peft calls a name that transformers has renamed; kernels that are not installed are slow.
pytestmark = pytest.mark.filterwarnings("ignore")

Rehearsed = Callable[..., Outcome]


@pytest.mark.parametrize("kind", ["qwen3_moe", "gemma2", "gpt_oss", "opt"])
def test_by_attention_to_one_document_at_a_time(rehearsed: Rehearsed, kind: str) -> None:
    outcome = rehearsed(kind, adapter=None, freeze={"train": ["norm|ln_"]})
    assert outcome.isolation == "documents" and outcome.status == "ok", outcome


@pytest.mark.parametrize(
    ("kind", "attention"), [("llama4_text", "auto"), ("deepseek_v32", "auto"), ("llama", "sdpa")]
)
def test_by_positions(rehearsed: Rehearsed, tmp_path: Path, kind: str, attention: str) -> None:
    """Llama 4 sees chunks of a document, and an indexer reads the mask."""
    model = {"base": str(tmp_path / "base"), "attention": attention}
    outcome = rehearsed(kind, adapter=None, freeze={"train": ["norm|ln_"]}, model=model)
    assert outcome.isolation == "positions" and outcome.status == "ok", outcome


@pytest.mark.parametrize(("longest", "isolation"), [(8191, "positions"), (8192, None)])
def test_rows_in_which_llama_4_scales_queries_hold_one_document(
    rehearsed: Rehearsed, longest: int, isolation: str | None
) -> None:
    """It counts the tokens of the row, so that a document is scaled by where it lies."""
    data = {"train": [{"path": "/x"}], "max_length": longest}
    outcome = rehearsed("llama4_text", adapter=None, freeze={"train": ["norm|ln_"]}, data=data)
    assert outcome.isolation == isolation and outcome.status == "ok", outcome


@pytest.mark.parametrize(("kind", "attention"), [("falcon", "auto"), ("gpt_oss", "eager")])
def test_by_a_block_mask(rehearsed: Rehearsed, tmp_path: Path, kind: str, attention: str) -> None:
    """Falcon's attention cannot be replaced."""
    model = {"base": str(tmp_path / "base"), "attention": attention}
    outcome = rehearsed(kind, adapter=None, freeze={"train": ["norm|ln_"]}, model=model)
    assert outcome.isolation == "mask" and outcome.status == "ok", outcome
    settings = {"name": "x", "model": {"base": "/m"}, "data": {"train": [{"path": "/x"}]}}
    packed, single = (
        recipe_from_dict({**settings, "data": {**settings["data"], "packing": packing}})
        for packing in ("auto", False)
    )
    (line,) = outcome.lines(packed)
    assert line.startswith("data.packing: attention cannot be computed one document at a time")
    assert outcome.lines(single) == []
    assert replace(outcome, isolation="documents").lines(packed) == []


@pytest.mark.parametrize(("kind", "isolation"), [("llama", "borders"), ("opt", None)])
def test_flash_attention_takes_borders_alone(
    rehearsed: Rehearsed, tmp_path: Path, kind: str, isolation: str | None
) -> None:
    model = {"base": str(tmp_path / "base"), "attention": "flash_attention_2"}
    outcome = rehearsed(kind, adapter=None, freeze={"train": ["norm|ln_"]}, model=model)
    assert outcome.isolation == isolation and outcome.status == "ok", outcome


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_models_that_mix_them(rehearsed: Rehearsed, kind: str) -> None:
    outcome = rehearsed(kind, adapter=None)
    assert outcome.isolation is None
    assert (
        outcome.unpacked_because == f"the architecture {kind} would mix documents that share a row"
    )


def test_positions_that_do_not_start_at_0(rehearsed: Rehearsed) -> None:
    """The rows of several documents would have other positions than one document alone."""
    outcome = rehearsed("xlm-roberta", {"is_decoder": True, "vocab_size": 96}, adapter=None)
    assert outcome.isolation is None and outcome.status == "ok", outcome


def test_kernels_that_are_not_installed_are_named(rehearsed: Rehearsed) -> None:
    outcome = rehearsed("qwen3_next", adapter=None)
    assert outcome.isolation is None
    assert "causal-conv1d, flash-linear-attention" in str(outcome.unpacked_because)


PACKAGES = {
    "causal_conv1d": "def causal_conv1d_fn(x, weight, bias=None, seq_idx=None): ...",
    "fla/ops/gated_delta_rule": "def chunk_gated_delta_rule(q, k, v, cu_seqlens=None): ...",
    "mamba_ssm/ops/triton": "def mamba_chunk_scan_combined(x, seq_idx=None): ...\n"
    "def mamba_split_conv1d_scan_combined(x, seq_idx=None): ...",
}
HYBRIDS = ("qwen3_next", "qwen3_5_text", "granitemoehybrid", "falcon_h1", "nemotron_h")
"""By kernels of flash-linear-attention, of mamba-ssm, and both with causal-conv1d."""
NOT_HANDED_ON = ("mamba", "mamba2")
"""The scan of the first takes no borders; the second does not hand them to its layers."""
MIXED = {"lfm2": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}}

SCRIPT = """
import json, sys, warnings
from pathlib import Path
sys.path.insert(0, f"{sys.argv[1]}/site")
warnings.simplefilter("ignore")
from finray.training.rehearsal.kernels import install
install()
from transformers import AutoConfig
from finray.training.models import import_peft
from finray.training.config.recipe import Recipe
from finray.training.rehearsal.packing import find_isolation
from finray.training.rehearsal.small_copy import VOCABULARY, make_copy
home = Path(sys.argv[1])
WAYS = tuple(json.loads(sys.argv[3]))
for kind, more in json.loads(sys.argv[2]).items():
    base, copy = home / kind, home / f"{kind}-copy"
    AutoConfig.for_model(kind, **more).save_pretrained(base)
    copy.mkdir()
    recipe = Recipe.model_validate(
        {"name": "x", "model": {"base": str(base)}, "data": {"train": [{"path": "/x"}]}}
    )
    copied = make_copy(recipe, copy)
    print(json.dumps([kind, *(find_isolation(copied, VOCABULARY, (way,))[0] for way in WAYS)]))
"""


def install(home: Path, packages: dict[str, str]) -> None:
    """Packages that can be imported on a GPU alone, as the kernels' are."""
    for path, source in packages.items():
        folder = home / "site" / path
        folder.mkdir(parents=True)
        (folder / "kernels.py").write_text(source, encoding="utf-8")
        for package in (home / "site" / path.partition("/")[0],):
            (package / "__init__.py").write_text("raise ImportError('no GPU')", encoding="utf-8")


def isolations(
    server: ForkServer, home: Path, kinds: dict[str, object], *ways: str
) -> dict[str, list[object]]:
    """What each of the ways gives."""
    printed = server.run(SCRIPT, str(home), json.dumps(kinds), json.dumps(ways))
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith('["')]
    return {kind: result for kind, *result in lines}


@pytest.mark.long
def test_kernels_take_the_borders(fork_server: ForkServer, tmp_path: Path) -> None:
    """Beside attention to one document at a time, or to a whole row of them."""
    install(tmp_path, PACKAGES)
    kinds: dict[str, object] = {**{kind: {} for kind in (*HYBRIDS, *NOT_HANDED_ON)}, **MIXED}
    ways = ("documents", "borders")
    expected = {
        **{kind: [*ways] for kind in (*HYBRIDS, *MIXED)},
        **{kind: [None, None] for kind in NOT_HANDED_ON},
    }
    assert isolations(fork_server, tmp_path, kinds, *ways) == expected


@pytest.mark.long
def test_a_kernel_without_borders_drops_them(fork_server: ForkServer, tmp_path: Path) -> None:
    older = {path: source.replace("seq_idx=None", "") for path, source in PACKAGES.items()}
    install(tmp_path, older | {"fla/ops/gated_delta_rule": PACKAGES["fla/ops/gated_delta_rule"]})
    kinds: dict[str, object] = {"qwen3_next": {}, "falcon_h1": {}}
    ways = ("documents", "positions", "mask", "borders")
    nothing: dict[str, list[object]] = {kind: [None] * len(ways) for kind in kinds}
    assert isolations(fork_server, tmp_path, kinds, *ways) == nothing


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_flash_attention_that_an_architecture_lacks_is_refused(
    rehearsed: Rehearsed, tmp_path: Path, kind: str
) -> None:
    model = {"base": str(tmp_path / "base"), "attention": "flash_attention_2"}
    outcome = rehearsed(kind, adapter=None, model=model)
    assert outcome.status == "refused"
    assert f"model.attention: the architecture {kind} has no flash attention" in str(
        outcome.message
    )
