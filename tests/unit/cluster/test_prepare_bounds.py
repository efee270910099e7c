"""`scale.prepare`: what is refused, and when large data is prepared on a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.recorded import RecordedProgress

from finray.cluster import launcher, preflight
from finray.training.common.background import Stop
from finray.training.config.recipe import Recipe, recipe_from_dict
from finray.training.config.sections import ScaleSettings
from finray.training.data.tasks import RunOnRayData


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ({"prepare": {}}, "prepare needs cpus or resources"),
        ({"prepare": {"cpus": 0}}, "greater than or equal to 1"),
        ({"prepare": {"resources": {"cpu_node": 0}}}, "greater than 0"),
        ({"prepare": {"resources": {"CPU": 2}}}, "CPU is Ray's own; name a custom resource"),
        ({"prepare": {"resources": {"GPU": 1}}}, "GPU is Ray's own"),
        ({"prepare": {"cpus": 2}, "workers": 0}, "with workers 0 this process prepares the data"),
    ],
)
def test_bounds_without_meaning_are_refused(scale: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaleSettings(**scale)


def test_tasks_take_the_bounds() -> None:
    scale = ScaleSettings(prepare={"cpus": 3, "resources": {"cpu_node": 0.5}})  # type: ignore[arg-type]
    assert RunOnRayData.within(scale.prepare) == RunOnRayData(3, {"cpu_node": 0.5})
    assert RunOnRayData.within(None) == RunOnRayData()


@pytest.mark.parametrize(
    ("wait", "fits", "order"),
    [
        (900.0, False, ["prepare", "nodes", "prepare", "workers"]),  # the second one is done
        (900.0, True, ["nodes", "prepare", "workers"]),
        (0.0, False, ["nodes", "prepare", "workers"]),  # refused at once
    ],
)
def test_large_data_is_prepared_before_nodes_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: float, fits: bool, order: list[str]
) -> None:
    seen: list[str] = []

    @contextmanager
    def session(*_: Any) -> Iterator[None]:
        yield

    class Workers:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> None:
            seen.append("workers")

        def __exit__(self, *_: Any) -> None: ...

    def checked(*_: Any) -> preflight.Preflight:
        seen.append("nodes")
        return preflight.Preflight((), {})

    monkeypatch.setattr(launcher, "open_ray", session)
    monkeypatch.setattr(launcher, "at_noted_commits", lambda recipe: recipe)
    monkeypatch.setattr(launcher, "worker_environment", lambda _: {})
    monkeypatch.setattr(launcher, "prepares_on_ray", lambda _: True)
    monkeypatch.setattr(launcher, "prepare_data", lambda *_: seen.append("prepare"))
    monkeypatch.setattr(launcher, "has_room", lambda _: fits)
    monkeypatch.setattr(launcher, "try_running_cluster", checked)
    monkeypatch.setattr(launcher, "RayLauncher", Workers)
    recipe: Recipe = recipe_from_dict(
        {"name": "t", "model": "/m", "data": {"train": "/a.jsonl"}, "storage": str(tmp_path)}
    )
    place = launcher.choose_launcher(
        *(recipe, Stop(), RecordedProgress()),
        address="head:6379",
        verbose=False,
        wait_for_nodes=wait,
    )
    with place:
        assert seen == order
