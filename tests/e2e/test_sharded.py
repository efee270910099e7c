"""Two workers with a shard of the model each: killed, resumed, and what comes out."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.alone import loads_alone
from support.harness import Finray, assert_same_result, losses, reached, record, wait_until, workers

pytestmark = pytest.mark.slow


def test_a_sharded_run(finray: Finray, tmp_path: Path) -> None:
    """Killed, it ends as undisturbed, bit for bit; as one process does, but for rounding."""
    settings = {
        "adapter__dropout": 0.0,
        "optim__max_steps": 20,
        "optim__learning_rate": 1e-3,
        "data__holdout": 0.1,
        "eval__samples": 3,
    }

    def recipe(name: str) -> Path:
        scale = {"scale__workers": 2, "scale__strategy": "fsdp"}
        return finray.recipe(name=name, **settings, **(scale if name != "whole" else {}))

    runs = finray.folder / "runs"
    finray.run("train", recipe("whole"))
    finray.run("train", recipe("sharded"))
    command = finray.start("train", recipe("killed"))
    wait_until(lambda: reached(runs / "killed", 7), "step 7")
    next(workers(command)).kill()
    assert command.wait() == 0, command.output()
    assert record(runs / "killed")["world_sizes"] == [2, 2]
    assert record(runs / "killed")["strategy"] == "fsdp"
    assert_same_result(runs / "killed", runs / "sharded")
    ours, theirs = losses(runs / "sharded"), losses(runs / "whole")
    assert ours == pytest.approx(theirs, abs=1e-5)
    weights = "adapter/adapter_model.safetensors"
    ours, theirs = (load_file(runs / name / weights) for name in ("sharded", "whole"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=1e-5, err_msg=name)
    answers = [record(runs / name)["metrics"] for name in ("sharded", "whole")]
    assert answers[0] == pytest.approx(answers[1], abs=1e-4)
    logits = loads_alone(
        *(runs / name / "adapter" for name in ("sharded", "whole")),
        ids=list(range(3, 40)),
        scratch=tmp_path,
    )
    np.testing.assert_allclose(*logits, atol=1e-4)
