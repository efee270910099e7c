"""What a run does with the outcome of its rehearsal; check says the same before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.rehearsed import NothingWrong
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaModel

import finray
from finray.training.rehearsal import child
from finray.training.rehearsal.outcome import Outcome

pytestmark = [pytest.mark.rehearses, pytest.mark.filterwarnings("ignore::FutureWarning")]

Settings = dict[str, Any]
MIXED = Outcome("ok", unpacked_because="its layers mix documents")


@pytest.fixture
def settings(tiny_model: Path, chat_file: Path, tmp_path: Path) -> Settings:
    return {
        "name": "run",
        "model": {"base": str(tiny_model)},
        "adapter": {"rank": 4},
        "data": {"train": [{"path": str(chat_file)}], "max_length": 64},
        "optim": {"max_steps": 1, "batch_size": 4, "schedule": "constant", "warmup_ratio": 0.0},
        "scale": {"workers": 0},
        "storage": str(tmp_path / "runs"),
    }


@pytest.fixture
def rehearses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Outcome], None]:
    """Every rehearsal from now on has this outcome."""

    def give(outcome: Outcome) -> None:
        class Child(NothingWrong):
            def outcome(self) -> Outcome:
                return outcome

        for kept in (tmp_path / "runs").glob("prepared/rehearsals/*"):
            kept.unlink()
        monkeypatch.setattr(child, "_Child", Child)

    return give


def test_check_and_train_refuse_alike(
    settings: Settings, rehearses: Callable[[Outcome], None], tmp_path: Path
) -> None:
    rehearses(Outcome("ok", isolation="positions"))
    run = finray.train(settings, quiet=True)
    rehearses(Outcome("refused", message="adapter.targets: LoRA on router breaks it; leave it out"))
    settings["adapter"]["rank"] = 2
    messages = []
    for call in (finray.check, finray.train):
        with pytest.raises(finray.InputError) as caught:
            call({**settings, "name": "other"}, quiet=True)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].endswith("adapter.targets: LoRA on router breaks it; leave it out")
    assert not (tmp_path / "runs" / "other").exists()
    with pytest.raises(finray.InputError):
        finray.train(settings, quiet=True, fresh=True)
    assert run.status == "finished" and not (tmp_path / "runs" / "run.1").exists()


@pytest.mark.long
def test_documents_that_would_mix_are_not_packed(
    settings: Settings, rehearses: Callable[[Outcome], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearses(MIXED)
    own_forward, positions = LlamaModel.forward, []

    def forward(model: Any, *inputs: Any, **more: Any) -> Any:
        if not isinstance(more.get("input_ids"), FakeTensor):  # by which memory is estimated
            positions.append(more.get("position_ids"))
        return own_forward(model, *inputs, **more)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    line = "data.packing: one document a row: its layers mix documents"
    outlook = finray.check(settings, quiet=True)
    assert outlook["rehearsal"]["lines"] == [line] and outlook["data"]["sequences"] == 240
    run = finray.train(settings, quiet=True)
    assert positions and set(positions) == {None}, "the model counts a single document's positions"
    assert run.record["data"]["packing"] is False
    assert run.record["data"]["train"]["sequences"] == 240
    assert run.record["rehearsal"]["lines"] == [line] and line in run.report.text
    rehearses(Outcome("ok", isolation="positions"))  # as if kernels had been installed
    longer = finray.train(settings, ["optim.max_steps=2"], quiet=True)
    assert longer.record["step"] == 2 and longer.record["data"]["packing"] is False
    with pytest.raises(finray.InputError, match=r"data\.packing: documents cannot share a row"):
        rehearses(MIXED)
        finray.train({**settings, "name": "packed"}, ["data.packing=true"], quiet=True)


def test_a_packed_run_is_not_resumed_unpacked(
    settings: Settings, rehearses: Callable[[Outcome], None]
) -> None:
    rehearses(Outcome("ok", isolation="positions"))
    assert finray.train(settings, quiet=True).record["data"]["packing"] is True
    rehearses(MIXED)
    for call in (finray.check, finray.train):
        with pytest.raises(finray.InputError, match=r"data\.packing: .*start over with --fresh"):
            call(settings, ["optim.max_steps=2"], quiet=True)


def test_what_is_left_out_is_not_trained(
    settings: Settings, rehearses: Callable[[Outcome], None]
) -> None:
    from safetensors.torch import load_file

    left_out = ("model.layers.*.mlp.gate_proj", "model.layers.1.self_attn.q_proj")
    rehearses(Outcome("ok", isolation="mask", left_out=left_out))
    outlook = finray.check(settings, quiet=True)
    run = finray.train(settings, quiet=True)
    names = set(load_file(run.folder / "adapter" / "adapter_model.safetensors"))
    assert not any("gate_proj" in name for name in names)
    assert {name.split(".")[4] for name in names if "q_proj" in name} == {"0"}
    # rank * (in + out) of k, v, o, up and down in both layers, and of q in the first one
    expected = 4 * (2 * (48 + 48 + 64 + 96 + 96) + 64)
    assert outlook["parameters"]["trainable"] == expected
    assert run.record["parameters"]["trainable"] == expected


def test_ways_to_keep_documents_apart_give_one_loss(
    settings: Settings, rehearses: Callable[[Outcome], None]
) -> None:
    losses = []
    for isolation in ("documents", "positions", "mask"):
        rehearses(Outcome("ok", isolation=isolation))
        run = finray.train({**settings, "name": isolation}, quiet=True)
        losses.append(run.metrics["loss"].dropna().tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0]
