"""Data sets of the hub: through the client libraries against a stand-in, and from the caches."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.hub import COMMIT, Hub, serving

from finray.training.common.errors import InputError
from finray.training.config.source import Source
from finray.training.data.expand import expand
from finray.training.data.hub import _commit
from finray.training.data.resolve import all_rows
from finray.training.data.row_changes import UNCHANGED
from finray.training.data.splits import splits_of

OTHER = "b" * 40


def lines(first: int, last: int) -> bytes:
    rows = ({"prompt": f"q{n}", "completion": f"a{n}"} for n in range(first, last))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def prompts(**source: Any) -> list[str]:
    files = expand(Source(**source)).files
    rows = all_rows(files, UNCHANGED, 2**20)
    return [row["prompt"] for _, row in rows if isinstance(row, dict)]


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serving() as hub:
        hub.datasets["org/pairs"] = {
            "README.md": b"# Pairs\n",
            "data/train-00000-of-00002.jsonl": lines(0, 60),
            "data/train-00001-of-00002.jsonl": lines(60, 80),
            "data/test-00000-of-00001.jsonl": lines(80, 100),
        }
        hub.datasets["org/gated"] = dict(hub.datasets["org/pairs"])
        hub.gated.add("org/gated")
        hub.datasets["org/script"] = {"README.md": b"", "script.py": b"import os"}
        yield hub


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    server.use(monkeypatch)
    return server


def test_a_split_of_a_data_set(hub: Hub) -> None:
    expanded = expand(Source(dataset="org/pairs"))
    assert expanded.commit == COMMIT and expanded.unread_splits == ("test",)
    assert [file.rows for file in expanded.files] == [None, None]
    assert prompts(dataset="org/pairs", split="train[55:62]") == [f"q{n}" for n in range(55, 62)]
    assert prompts(dataset="org/pairs", split="test", revision=COMMIT)[0] == "q80"


def test_an_address_means_the_files_of_a_commit(hub: Hub) -> None:
    for address in ("org/pairs", f"org/pairs@{COMMIT}", "org/pairs@main"):
        expanded = expand(Source(path=f"hf://datasets/{address}/data/test-*.jsonl"))
        assert expanded.commit == COMMIT
        assert [file.uri for file in expanded.files] == [
            f"hf://datasets/org/pairs@{COMMIT}/data/test-00000-of-00001.jsonl"
        ]
    assert prompts(path="hf://datasets/org/pairs", split="test")[0] == "q80"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "hf://datasets/org/none/a.jsonl"}, "^path: org/none does not exist on the hub"),
        ({"path": "hf://datasets/org/pairs@v9/a.jsonl"}, "^path: org/pairs has no revision v9"),
        ({"path": "hf://datasets/org/pairs/no.jsonl"}, "no.jsonl: no such file"),
        ({"dataset": "org/none"}, r"org/none does not exist on the hub, or is private.*HF_TOKEN"),
        ({"dataset": "org/gated"}, r"org/gated is gated; ask for access at .*HF_TOKEN"),
        ({"dataset": "org/pairs", "revision": "v9"}, "no revision v9"),
        ({"dataset": "org/pairs", "split": "dev"}, "no split dev; its splits: train, test"),
        ({"dataset": "org/pairs", "subset": "en"}, "no subset en; it has none"),
        ({"dataset": "org/script"}, r"loading script \(script.py\), whose code is not run"),
        ({"dataset": "a b"}, "neither a folder nor a data set"),
    ],
)
def test_bad_names_are_one_line(hub: Hub, source: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        expand(Source(**source))
    assert "\n" not in str(caught.value)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    _commit.cache_clear()
    return tmp_path


def cache_arrow(folder: Path, name: str, subset: str = "default") -> None:
    """What `load_dataset` leaves in its cache."""
    import datasets

    made = datasets.Dataset.from_list(
        [{"prompt": f"{subset}{n}", "completion": "a"} for n in range(9)]
    )
    home = folder / "datasets" / name.replace("/", "___") / subset / "0.0.0" / COMMIT
    home.mkdir(parents=True)
    base = name.rpartition("/")[2]
    with datasets.arrow_writer.ArrowWriter(
        features=made.features, path=str(home / f"{base}-train.arrow")
    ) as writer:
        for row in made:
            writer.write(row)
        writer.finalize()
    split = datasets.splits.SplitInfo("train", num_bytes=1, num_examples=9, dataset_name=base)
    info = datasets.DatasetInfo(
        features=made.features,
        splits=datasets.splits.SplitDict({"train": split}, dataset_name=base),
        config_name=subset,
        dataset_name=base,
        builder_name="parquet",
    )
    info.write_to_directory(str(home))


def test_without_a_network_the_caches_are_read(offline: Path) -> None:
    cache_arrow(offline, "org/loaded")
    snapshot = offline / "hub" / "datasets--org--fetched" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "train.jsonl").write_bytes(lines(0, 5))
    (snapshot / "test.jsonl").write_bytes(lines(5, 7))
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    assert prompts(dataset="org/loaded") == [f"default{n}" for n in range(9)]
    assert prompts(dataset="org/loaded", split="train[2:4]") == ["default2", "default3"]
    assert prompts(dataset="org/loaded", revision=COMMIT)[:1] == ["default0"]
    assert prompts(dataset="org/fetched", split="test") == ["q5", "q6"]


def test_a_cache_of_two_commits_gives_the_pinned_one(offline: Path) -> None:
    cache_arrow(offline, "org/moved")
    cached = offline / "datasets" / "org___moved" / "default" / "0.0.0"
    later = shutil.copytree(cached / COMMIT, cached / OTHER)
    os.utime(cached / COMMIT, (1e9, 1e9))
    for revision in (None, COMMIT, OTHER):
        expanded = expand(Source(dataset="org/moved", revision=revision))
        assert expanded.commit == (revision or OTHER)
        assert (expanded.files[0].folder == str(later)) == (revision != COMMIT)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, offline: Path) -> None:
    """Nothing listens where the hub should be."""
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)


def test_without_a_network_it_fails_at_once(
    no_network: None, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hardly a pause is made before another try."""
    cache_arrow(offline, "org/loaded")
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert prompts(dataset="org/loaded", split="train[:1]") == ["default0"]
    for source, message in (
        (
            {"dataset": "org/none"},
            "^dataset: the hub cannot be reached, and no cache holds org/none",
        ),
        ({"path": "hf://datasets/org/none/a.jsonl"}, "^path: the hub cannot be reached, where"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            expand(Source(**source))
        assert "\n" not in str(caught.value)
    assert sum(pauses) < 5


def test_what_no_cache_holds_is_named(offline: Path) -> None:
    cache_arrow(offline, "org/two", "en")
    cache_arrow(offline, "org/two", "de")
    assert prompts(dataset="org/two", subset="de")[0] == "de0"
    for source, message in (
        ({"dataset": "org/none"}, "no cache holds org/none; fetch it where there is a network: hf"),
        ({"dataset": "org/two", "revision": "v9", "subset": "en"}, "org/two at revision v9"),
        ({"dataset": "org/two"}, "^subset: .*(en, de|de, en)"),
        ({"dataset": "org/two", "subset": "fr"}, "^subset: .*fr"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            expand(Source(**source))
        assert "\n" not in str(caught.value)


def test_the_datasets_library_agrees_on_splits(tmp_path: Path) -> None:
    """Where names alone decide, no library is asked; where it is, its rule is its own."""
    from datasets.data_files import DEFAULT_PATTERNS_ALL, get_data_patterns

    from finray.training.common.storage import Folder

    for number, names in enumerate(
        (
            ["a.jsonl", "contest.jsonl"],
            ["train.jsonl", "test.jsonl"],
            ["my-train-1.jsonl", "my-train-2.jsonl", "validation.jsonl"],
            ["train/a.jsonl", "dev/b.jsonl"],
            ["data/train_sft-00000-of-00001.jsonl", "data/test_sft-00000-of-00001.jsonl"],
            ["evaluation_set.jsonl", "x.jsonl"],
            ["latest.jsonl", "medieval.jsonl"],
        )
    ):
        folder = tmp_path / str(number)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(lines(0, 2))
        patterns = get_data_patterns(str(folder))
        splits = splits_of(Folder(str(folder)), None)
        assert list(splits) == list(map(str, patterns)), names
        if patterns == DEFAULT_PATTERNS_ALL:
            assert [file.name for file in splits["train"]] == sorted(names)
