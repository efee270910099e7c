"""`finray generate`: the answers of a run, against transformers and PEFT by themselves."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from pyarrow import fs as pafs
from safetensors.torch import load_file, save_file
from support.finished_run import finished_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import finray
from finray.cluster.cli.main import main
from finray.cluster.screens.answers import render_generated
from finray.training.common import storage
from finray.training.common.errors import InputError, RunError
from finray.training.common.storage import Folder
from finray.training.config.base_digest import BASE_FILE
from finray.training.config.source import Source
from finray.training.evaluation import generate as generating
from finray.training.evaluation.answer_file import AnswerFile
from finray.training.evaluation.answer_settings import AnswerSettings
from finray.training.evaluation.answering import Ask
from finray.training.evaluation.generate import generate, here
from finray.training.evaluation.located import UnfinishedRun, locate
from finray.training.evaluation.opened import Opened, open_located, open_unloaded

Write = Callable[[Path, list[Any]], Path]
Read = Callable[[Path], list[Any]]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
ROWS: list[Any] = [
    {"messages": [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "fox"}]},
    {"messages": [{"role": "system", "content": "tiny"}, {"role": "user", "content": "model"}]},
    {"conversations": [{"from": "human", "value": "lazy dog"}]},
    {"instruction": "learn", "input": "task"},
    {"instruction": "learn", "input": "", "output": "quickly"},
    {"prompt": "The quick brown "},
    {"prompt": [{"role": "user", "content": "for ever"}], "reference": "A"},
    {"prompt": "jumps", "chosen": "over", "rejected": "under"},
    {"text": "a text alone"},
    {"messages": []},
]


@pytest.fixture(scope="module")
def plain(run: Path, tiny_model: Path) -> tuple[Any, Any]:
    """PEFT's model and its tokenizer, loaded without finray."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, run / "adapter"), AutoTokenizer.from_pretrained(
        run / "adapter"
    )


def greedy(plain: tuple[Any, Any], prompt: str | list[Any], tokens: int) -> str:
    model, tokenizer = plain
    text = prompt
    if not isinstance(prompt, str):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    answer: str = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer


def test_rows_with_other_keys_are_renamed_in_the_file(
    tmp_path: Path, write: Write, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither generate nor eval has a recipe whose source renames them."""
    rows = str(write(tmp_path / "rows.jsonl", [{"q": "quick", "a": "fox"}]))
    for command in (
        ["generate", str(tiny_model), "--prompts", rows, "--to", str(tmp_path / "answers.jsonl")],
        ["eval", str(tiny_model), "--data", rows],
    ):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert f"{rows}:1: no row format has these keys: q, a" in err
        assert "rename the keys of your rows in the file" in err and "columns" not in err


def test_the_answers_are_those_of_plain_transformers(
    run: Path, plain: tuple[Any, Any], tmp_path: Path, write: Write, read: Read
) -> None:
    """Every shape of row, in batches with padding, with and without the adapter."""
    prompts = write(tmp_path / "rows.jsonl", ROWS)
    summary = finray.generate(
        run, prompts, tmp_path / "out.jsonl", max_tokens=6, base=True, batch=4
    )
    lines = read(tmp_path / "out.jsonl")
    assert [line["row"] for line in lines] == list(range(1, 11))
    asked = [line["prompt"] for line in lines[:8]]
    assert asked[1] == ROWS[1]["messages"] and asked[5] == "The quick brown "
    assert asked[3] == [{"role": "user", "content": "learn\n\ntask"}]
    assert asked[2] == [{"role": "user", "content": "lazy dog"}] and asked[7] == "jumps"
    references = [line.get("reference") for line in lines[:8]]
    assert references == ["fox", None, None, None, "quickly", None, "A", "over"]
    for line in lines[:5] + lines[6:8]:
        assert line["answer"] == greedy(plain, line["prompt"], 6)
        with plain[0].disable_adapter():
            assert line["base"] == greedy(plain, line["prompt"], 6)
    assert {line["answer"] for line in lines[:8]} != {line["base"] for line in lines[:8]}
    assert len(summary.bad) == 2 and summary.plain == 2
    shown = render_generated(summary, as_json=False)
    assert f"{prompts}:9: prompt is missing" in shown and f"{prompts}:10: " in shown


def test_tools_reach_the_template(
    run: Path, opened: Opened, tmp_path: Path, write: Write, read: Read
) -> None:
    """The project's own rendering refuses tools that this template leaves out."""
    row = {"prompt": [{"role": "user", "content": "add"}], "tools": TOOLS}
    prompts = write(tmp_path / "rows.jsonl", [row])
    finray.generate(run, prompts, tmp_path / "out.jsonl", max_tokens=2)
    assert "tools" in read(tmp_path / "out.jsonl")[0]["error"]


def test_a_killed_process_goes_on(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write, read: Read
) -> None:
    """The file is that of an undisturbed process, and no batch is answered twice."""
    rows = [
        {"prompt": [{"role": "user", "content": f"task {n} " * (1 + n % 5)}]} for n in range(20)
    ]
    source = [Source(path=str(write(tmp_path / "rows.jsonl", rows)))]
    for temperature in (0.0, 1.0):
        settings = AnswerSettings(max_tokens=4, at_once=3, temperature=temperature, seed=7)
        whole, again = tmp_path / f"whole-{temperature}", tmp_path / f"again-{temperature}"
        generate([opened], source, whole, settings, identity="x")
        asked: list[int] = []

        def dying(waiting: Iterator[list[Ask]]) -> Iterator[generating.Batch]:
            for count, done in enumerate(here([opened], settings)(waiting)):  # noqa: B023
                if count == 3:
                    raise KeyboardInterrupt
                asked.extend(ask.row.number for ask in done[0])  # noqa: B023
                yield done

        with pytest.raises(KeyboardInterrupt):
            generate([opened], source, again, settings, identity="x", answering=dying)
        assert not again.exists()
        part = again.with_name(f"{again.name}.part")
        with part.open("ab") as file:  # the kill came within a line
            file.write(b'{"row": 1, "ans')

        def counting(waiting: Iterator[list[Ask]]) -> Iterator[generating.Batch]:
            for done in here([opened], settings)(waiting):  # noqa: B023
                asked.extend(ask.row.number for ask in done[0])  # noqa: B023
                yield done

        summary = generate([opened], source, again, settings, identity="x", answering=counting)
        assert again.read_bytes() == whole.read_bytes() and not part.exists()
        assert sorted(asked) == list(range(1, 21)) and summary.before == 9
    greedy_lines, sampled = (read(tmp_path / f"whole-{t}") for t in (0.0, 1.0))
    assert greedy_lines != sampled


def test_a_part_of_other_settings_is_not_continued(
    opened: Opened, tmp_path: Path, write: Write
) -> None:
    source = [Source(path=str(write(tmp_path / "rows.jsonl", ROWS[:3])))]

    def dying(waiting: Iterator[list[Ask]]) -> Iterator[generating.Batch]:
        yield from here([opened], AnswerSettings(max_tokens=2))(waiting)
        raise KeyboardInterrupt

    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate(
            *([opened], source, target, AnswerSettings(max_tokens=2)),
            identity="x",
            answering=dying,
        )
    with pytest.raises(InputError, match=r"started with other settings \(max_tokens\)"):
        generate([opened], source, target, AnswerSettings(max_tokens=3), identity="x")


def test_a_sampled_answer_depends_on_its_row_alone(
    opened: Opened, tmp_path: Path, write: Write, read: Read
) -> None:
    rows = [{"prompt": [{"role": "user", "content": "same"}]} for _ in range(5)]
    source = [Source(path=str(write(tmp_path / "rows.jsonl", rows)))]
    texts = []
    for at_once in (1, 4):
        settings = AnswerSettings(max_tokens=8, temperature=1.5, seed=3, at_once=at_once)
        target = tmp_path / f"{at_once}.jsonl"
        generate([opened], source, target, settings, identity="x")
        texts.append([line["answer"] for line in read(target)])
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    # the first token, drawn by hand
    uniform = np.random.default_rng((3, 1)).random(8)[0]
    ask = opened.tokenizer.apply_chat_template(
        rows[0]["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        logits = opened.model(**ask).logits[0, -1].double() / 1.5
    token = int(torch.searchsorted(logits.softmax(-1).cumsum(-1), uniform, right=True))
    first = opened.tokenizer.decode([token], skip_special_tokens=True)
    assert texts[0][0].startswith(first)


def test_a_prompt_may_fill_the_context(
    opened: Opened, tmp_path: Path, write: Write, read: Read
) -> None:
    """128 positions: one prompt leaves a few tokens, and another none."""
    rows = [{"prompt": "0 1 2 3 4 " * n} for n in (1, 11, 40)]
    source = [Source(path=str(write(tmp_path / "rows.jsonl", rows)))]
    target = tmp_path / "out.jsonl"
    generate([opened], source, target, AnswerSettings(max_tokens=40), identity="x")
    first, second, third = read(target)
    size = len(opened.tokenizer("0 1 2 3 4 " * 11)["input_ids"])
    assert first["tokens"] <= 40 and 88 < size < 128
    assert second["tokens"] <= 128 - size + 1 and "context of 128" in third["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nope",), "there is no run nope; those in {runs}: support"),
        (("runs/nope",), "there is no run runs/nope; those in {runs}: support"),
        (("{runs}",), "{runs} holds neither a run nor a model; those in {runs}: support"),
        (("support", "--max-tokens", "0"), "--max-tokens: 0 is not above 0; give 1 or more"),
        (("support", "--temperature", "-1"), "--temperature: -1.0 is not 0 or above"),
        (("support", "--temperature", "nan"), "expected a number, found 'nan'"),
        (("support", "--top-p", "0"), "--top-p: 0.0 is not above 0 and at most 1"),
        (
            ("support", "--workers", "0"),
            "--workers: expected a whole number of at least 1, found 0",
        ),
        (("support", "--to", "{prompts}"), "rows.jsonl holds the prompts; give another file"),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    write: Write,
) -> None:
    monkeypatch.chdir(run.parent.parent)
    prompts = write(tmp_path / "rows.jsonl", ROWS[:1])
    runs = str(run.parent)
    words = [word.format(runs=runs, prompts=prompts) for word in arguments]
    files = ["--prompts", str(prompts), "--to", str(tmp_path / "out")]
    code = main(["generate", *files, *words])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and message.format(runs=runs) in err


def test_an_unfinished_run_names_its_best_checkpoint(
    run: Path, tiny_model: Path, tmp_path: Path, write: Write, read: Read
) -> None:
    folder = finished_run(tmp_path, tiny_model)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "stopped"}))
    with pytest.raises(InputError, match="the run is not finished"):
        locate(str(folder), Path.cwd())
    for step, loss in ((10, 0.5), (20, 0.25), (30, 0.75)):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        for file in (folder / "adapter").iterdir():
            (checkpoint / file.name).write_bytes(file.read_bytes())
        manifest = {"format": 1, "world_size": 1, "metrics": {"eval_loss": loss}, "files": {}}
        (checkpoint / "rank-0.json").write_text(json.dumps(manifest))
    with pytest.raises(UnfinishedRun, match="best checkpoint") as error:
        locate(str(folder), Path.cwd())
    best = folder / "checkpoints" / "step-00000020"
    assert error.value.checkpoint == str(best)
    prompts = write(tmp_path / "rows.jsonl", ROWS[:2])
    finray.generate(best, prompts, tmp_path / "of-checkpoint.jsonl", max_tokens=4)
    finray.generate(run, prompts, tmp_path / "of-run.jsonl", max_tokens=4)
    assert read(tmp_path / "of-checkpoint.jsonl") == read(tmp_path / "of-run.jsonl")


def test_a_base_that_moved_or_changed_is_said(
    tiny_model: Path, tmp_path: Path, write: Write
) -> None:
    """Another base would answer without a word; both ways to load the run refuse it."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    folder = finished_run(tmp_path, base)
    located = locate(str(folder), Path.cwd())
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in tensors.items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    for load in (open_located, open_unloaded):
        with pytest.raises(InputError, match=r"the weights of its base .* have changed since"):
            load(located)
    base.rename(tmp_path / "moved")
    for load in (open_located, open_unloaded):
        with pytest.raises(InputError, match=f"its base {base} is not there; move it back, or"):
            load(located)
    shutil.rmtree(tmp_path / "moved")
    shutil.copytree(tiny_model, tmp_path / "moved")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(base), str(tmp_path / "moved")))
    assert open_located(locate(str(folder), Path.cwd())).stops
    (folder / "adapter" / BASE_FILE).write_text("{")
    for load in (open_located, open_unloaded):
        with pytest.raises(InputError, match=rf"cannot read .*{BASE_FILE}: "):
            load(locate(str(folder), Path.cwd()))


def test_a_checkpoint_in_an_object_store_is_offered_and_opened(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_root(root: str) -> tuple[Any, str]:
        if root.startswith("s3://"):
            return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "bucket"
        return pafs.LocalFileSystem(), "/"

    monkeypatch.setattr(storage, "_filesystem", open_root)
    folder = finished_run(tmp_path / "bucket", tiny_model)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "stopped"}))
    checkpoint = folder / "checkpoints" / "step-00000010"
    shutil.copytree(folder / "adapter", checkpoint)
    manifest = {"format": 1, "world_size": 1, "metrics": {"eval_loss": 0.5}, "files": {}}
    (checkpoint / "rank-0.json").write_text(json.dumps(manifest))
    with pytest.raises(UnfinishedRun) as error:
        locate("s3://bucket/runs/support?x=1", Path.cwd())
    offered = "s3://bucket/runs/support/checkpoints/step-00000010?x=1"
    assert error.value.checkpoint == offered
    located = locate(offered, Path.cwd())
    assert located.folder == Folder("s3://bucket/runs/support?x=1")
    assert open_located(located).stops == open_unloaded(located).stops
    with pytest.raises(InputError, match=r"there is no run s3://bucket/.*-00000020"):
        locate("s3://bucket/runs/support/checkpoints/step-00000020", Path.cwd())


def test_a_full_disk_is_one_line_and_costs_no_answer(tmp_path: Path) -> None:
    decides = {"model": "x"}
    with AnswerFile(tmp_path / "out", decides) as file:
        file.add([{"row": 1, "answer": "fox"}])
        file._file.close()
        file._file = Path("/dev/full").open("wb")  # noqa: SIM115 - the context closes it
        with pytest.raises(RunError, match=r"out.part: cannot be written: No space .* continues"):
            file.add([{"row": 2, "answer": "dog"}])
    with AnswerFile(tmp_path / "out", decides) as file:
        assert list(file.lines) == [1]


def test_a_damaged_first_line_costs_no_answer(tmp_path: Path) -> None:
    """Without it nothing says whether the answers are of these settings, so they are kept."""
    with AnswerFile(tmp_path / "out", {"model": "x"}) as file:
        file.add([{"row": 1, "answer": "fox"}])
    part = tmp_path / "out.part"
    kept = part.read_bytes().partition(b"\n")[2]
    part.write_bytes(b'{"model\n' + kept)
    with pytest.raises(InputError, match=r"out.part: line 1 is damaged, .* the 1 answers below"):
        AnswerFile(tmp_path / "out", {"model": "x"})
    assert part.read_bytes().endswith(kept)
    part.write_bytes(b'{"model')
    with AnswerFile(tmp_path / "out", {"model": "x"}) as file:
        assert not file.lines


def test_what_is_wrong_is_said_before_torch_is_loaded(
    run: Path, tmp_path: Path, write: Write
) -> None:
    prompts = str(write(tmp_path / "rows.jsonl", ROWS[:1]))
    cases = {
        "nope.jsonl: no such file or folder": {"prompts": str(tmp_path / "nope.jsonl")},
        "--engine: vllm is not installed; pip install": {"engine": "vllm"},
        "generate: max_tokens: expected a whole number, found 'a'": {"max_tokens": "a"},
        "--workers: expected a whole number of at least 1, found 'a'": {"workers": "a"},
    }
    program = f"""
import sys, finray
for case in {list(cases.values())!r}:
    try:
        how = {{"prompts": {prompts!r}, **case}}
        finray.generate({str(run)!r}, to={str(tmp_path / "out")!r}, **how)
    except finray.InputError as error:
        print("torch" in sys.modules, error)
try:
    finray.evaluate({str(run)!r}, {str(tmp_path / "rows.json")!r})
except finray.InputError as error:
    print("torch" in sys.modules, error)
"""
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for message, line in zip([*cases, "rows.json: no such"], said, strict=True):
        assert line.startswith("False") and message in line
