"""`finray eval` from end to end: losses, a judge behind a real server, what fails, the page."""

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from pyarrow import fs as pafs
from support.finished_run import finished_run
from support.model_hub import listening
from support.stored_runs import checkpoint, stored_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import finray
from finray.cluster.api.results import RunResult
from finray.cluster.cli.main import main
from finray.training.common import storage
from finray.training.common.errors import InputError, RunError
from finray.training.common.storage import Folder
from finray.training.config.source import Source
from finray.training.evaluation import judge as judging
from finray.training.evaluation.judge import Judge
from finray.training.evaluation.losses import loss_of
from finray.training.evaluation.opened import Opened
from finray.training.evaluation.prompts import read_prompts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Write = Callable[[Path, list[Any]], Path]
Read = Callable[[Path], list[Any]]
ROWS = [
    {"messages": [{"role": "user", "content": f"task {n}"}, {"role": "assistant", "content": text}]}
    for n, text in enumerate(["quick", "brown fox", "0 1 2", "lazy dog <b>&amp;", "ever"])
]


@dataclass
class Server:
    """An OpenAI-compatible judge on loopback."""

    answer: Callable[[str], str]
    """From the text of a request to that of the reply."""
    statuses: list[int] = field(default_factory=list)
    """Replies to the first requests, before it answers."""
    refusal: str = ""
    """What it says with a status that is not 200."""
    pause: int = 0
    """Seconds that it then asks to wait."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    address: str = ""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server(lambda text: '{"score": 7}')

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.asked.append(body)
            state.tokens.append(self.headers["Authorization"])
            status = state.statuses.pop(0) if state.statuses else 200
            text = state.answer(body["messages"][1]["content"])
            reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            status = status if self.path == "/v1/chat/completions" else 404
            self.send_response(status)
            if status != 200:
                reply = json.dumps({"error": {"message": state.refusal}}).encode()
                self.send_header("Retry-After", str(state.pause))
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("FINRAY_JUDGE_TOKEN", "t0ken")
    monkeypatch.setattr(judging, "_FIRST_PAUSE", 0.0)
    with listening(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        state.address = f"{address}/v1"
        yield state


def judge(server: Server) -> Judge:
    return Judge(server.address, "m", pause=0.0)


def test_the_loss_is_that_of_plain_transformers(
    run: Path, tiny_model: Path, tmp_path: Path, write: Write
) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    result = finray.evaluate(run, data, base=True, max_tokens=2, to=tmp_path / "eval", batch=2)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    measured = {one["name"]: one for one in result.record["measures"]}

    def loss(model: Any) -> tuple[float, int]:
        total, count = 0.0, 0
        for row in ROWS:
            whole = tokenizer.apply_chat_template(row["messages"], tokenize=False)
            start = whole.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
            ids = tokenizer(whole, return_tensors="pt", add_special_tokens=False)["input_ids"]
            first = len(tokenizer(whole[:start], add_special_tokens=False)["input_ids"])
            labels = ids.clone()
            labels[:, :first] = -100
            with torch.no_grad():
                mean = float(model(input_ids=ids, labels=labels).loss)
            size = ids.shape[1] - first
            total, count = total + mean * size, count + size
        return total / count, count

    expected, count = loss(base)
    assert measured["loss"]["values"]["base"] == pytest.approx(expected, rel=1e-5)
    assert measured["loss"]["count"] == count
    tuned, _ = loss(PeftModel.from_pretrained(base, run / "adapter"))
    assert measured["loss"]["values"]["answer"] == pytest.approx(tuned, rel=1e-5)
    assert measured["perplexity"]["values"]["base"] == pytest.approx(2.718281828**expected)
    assert result.values["loss"] == measured["loss"]["values"]["answer"]


def test_logits_are_computed_for_answers_alone(
    opened: Opened, tmp_path: Path, write: Write
) -> None:
    """And the loss is the same where the model computes its own."""
    source = [Source(path=str(write(tmp_path / "rows.jsonl", ROWS)))]
    rows, tokens = list(read_prompts(source)), list[int]()
    head = opened.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, logits: tokens.append(logits.shape[1]))
    assert opened.head is not None
    tokens.clear()
    apart = loss_of(opened, rows)
    assert set(tokens) == {0}
    whole = replace(opened)
    whole.__dict__["head"] = None
    together = loss_of(whole, rows)
    assert max(tokens) > 0 and apart.total == pytest.approx(together.total, rel=1e-6)
    hook.remove()


def test_a_prompt_that_the_other_model_refuses_is_compared_by_neither(
    run: Path, tiny_model: Path, tmp_path: Path, write: Write
) -> None:
    short = shutil.copytree(tiny_model, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "quick fox " * 9, "completion": "b"}]
    data = write(tmp_path / "rows.jsonl", rows)
    target = tmp_path / "eval"
    result = finray.evaluate(run, data, against=short, loss=False, max_tokens=2, to=target)
    assert result.record["answered"] == 1 and len(result.record["bad"]) == 1
    assert "context of 16" in result.record["bad"][0]
    assert [one["count"] for one in result.record["measures"]] == [1, 1]
    assert "context of 16" in result.report.text


def test_a_judge_scores_and_prefers(
    run: Path, tiny_model: Path, tmp_path: Path, write: Write, read: Read, server: Server
) -> None:
    """It takes the longer answer, in both orders; and it is asked once for each row."""
    other = finished_run(tmp_path, tiny_model, "model", run_name=run.name)
    data = write(tmp_path / "rows.jsonl", ROWS)

    def verdict(text: str) -> str:
        if "[Answer A]" not in text:
            return '```json\n{"score": 4}\n```'
        a, _, b = text.partition("[Answer A]\n")[2].partition("\n\n[Answer B]\n")
        return json.dumps({"winner": "tie" if len(a) == len(b) else "AB"[len(b) > len(a)]})

    server.answer = verdict
    result = finray.evaluate(
        *(run, data),
        judge=server.address,
        judge_model="grader",
        against=other,
        loss=False,
        max_tokens=4,
        to=tmp_path / "eval",
    )
    lines = read(tmp_path / "eval" / "eval.jsonl")
    lengths = [(len(line["answer"]), len(line["against"])) for line in lines]
    wins = sum(own > against for own, against in lengths)
    losses = sum(own < against for own, against in lengths)
    assert wins + losses > 0
    preference = result.record["preferences"][0]
    assert preference == {"by": "judge", "wins": wins, "losses": losses, "ties": 5 - wins - losses}
    assert result.values["judge"] == 4.0 and not result.problems
    assert len(server.asked) == 5 * (2 + 2)
    assert result.record["models"] == {"answer": str(run), "against": str(other)}, "of one name"
    assert {body["model"] for body in server.asked} == {"grader"}
    assert set(server.tokens) == {"Bearer t0ken"}
    assert "t0ken" not in (tmp_path / "eval" / "eval.html").read_text()


@pytest.mark.parametrize("always", ["A", "B", "tie"])
def test_a_judge_that_prefers_a_place_makes_ties(server: Server, always: str) -> None:
    server.answer = lambda text: json.dumps({"winner": always})
    assert judge(server).prefer("ask", "one", "two", None) == "tie"


def test_what_may_pass_is_tried_again(server: Server) -> None:
    server.statuses = [503, 429]
    assert judge(server).score("ask", "one", "two") == 7.0 and len(server.asked) == 3
    server.statuses = [401, 200]
    with pytest.raises(RunError, match=r"does not answer: 401 .*; set \$FINRAY_JUDGE_TOKEN"):
        judge(server).score("ask", "one", None)
    assert len(server.asked) == 4
    server.answer = lambda text: "what a lovely answer"
    with pytest.raises(RunError, match="gave no score from 1 to 10"):
        judge(server).score("ask", "one", None)
    with pytest.raises(RunError, match="chose neither A, B nor tie"):
        judge(server).prefer("ask", "one", "two", None)


def test_a_refusal_says_why_and_how_long(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(judging, "time", SimpleNamespace(sleep=pauses.append))
    server.pause, server.refusal, server.statuses = 3, "3 a minute", [429] * 4
    with pytest.raises(RunError, match=r"after 4 tries: 429 Too Many Requests \(3 a minute\)$"):
        judge(server).score("ask", "one", None)
    assert pauses == [3, 6, 12]
    server.statuses = [429] * 4
    with pytest.raises(RunError, match="after 4 tries"):
        Judge(server.address, "m", pause=40).score("ask", "one", None)
    assert pauses[3:] == [40, 60, 60], "at most a minute"
    server.refusal, server.statuses = "no model m", [404]
    with pytest.raises(RunError, match=r"404 .* \(no model m\); .* /v1, and is m a model there"):
        judge(server).score("ask", "one", None)


def test_an_interrupt_does_not_wait_for_the_judge() -> None:
    waits, answered = threading.Event(), []

    def ask(item: str) -> str:
        if item == "slow":
            waits.wait(5)
            answered.append(item)
        return item

    def interrupt(*_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judging.ask_all(["slow", "quick"], ask, interrupt)
    assert not answered
    waits.set()


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"score": 7}', 7),
        ('<think>{"score": 2}? It has 3 faults.</think>\n{"score": 8}', 8),
        ("<think>Perhaps 3, or 9.</think>Score: 8/10", 8),
        ("I give it 8 out of 10.", 8),
        ("**8**. An 8 is fair.", 8),
        ('I weigh {style: 3} and {"facts": 5}. {"score": 6.5, "parts": {"score": 1}}', 6.5),
        ('First {"score": 3}, but then {"score": 9}.', 9),
        ('{"result": {"score": 4}}', 4),
        ('{"score": "8/10"}', 8),
        ("It meets 3 of the criteria, so 8.", None),
        ("<think>Is it a 7? Or", None),
        ('<think>{"score": 7}</think>I cannot say.', None),
        ('{"score": 0, "reason": "3 faults"}', None),
        ('{"score": true}', None),
        ('{"score": null} 5 points', None),
        ("-5", None),
        ("7.55.1", None),
        ("{" * 3000, None),
    ],
)
def test_the_score_is_the_last_word_and_never_guessed(
    text: str, score: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judge, "_ask", lambda *_: text)
    if score is not None:
        assert Judge("http://x", "m").score("ask", "one", None) == score
        return
    with pytest.raises(RunError, match="gave no score from 1 to 10"):
        Judge("http://x", "m").score("ask", "one", None)


def test_the_choice_is_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = ['<think>{"winner": "B"}?</think>{"winner": "A"}', '{"x": {}} {"winner": "B"}']
    monkeypatch.setattr(Judge, "_ask", lambda *_: replies.pop(0))
    assert Judge("http://x", "m").prefer("ask", "one", "two", None) == "first"


@pytest.mark.long
def test_words_of_the_judge_do_not_make_it_silent(server: Server) -> None:
    """A reply that says "does not answer" is no silence: the other rows are asked."""
    server.answer = lambda text: "the text does not answer" if "one" in text else '{"score": 5}'
    scores: dict[str, float] = {}
    texts = ["one", *(f"text {number}" for number in range(20))]
    problem = judging.ask_all(
        texts, lambda text: judge(server).score("ask", text, None), scores.__setitem__
    )
    assert "the text does not answer" in problem and set(scores) == set(texts[1:])


def test_a_reply_without_text_is_no_score(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answer = lambda text: None  # type: ignore[assignment, return-value]
    with pytest.raises(RunError, match="sent no answer"):
        judge(server).score("ask", "one", None)


def test_a_silent_judge_loses_nothing(
    run: Path,
    tmp_path: Path,
    write: Write,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line and exit code 1; the same command goes on, without answering again."""
    data = write(tmp_path / "rows.jsonl", ROWS)
    target = tmp_path / "eval"
    words = ["eval", str(run), "--data", str(data), "--to", str(target), "--max-tokens", "3"]
    words += ["--judge-model", "m", "--quiet", "--judge"]
    real = judging.Judge
    monkeypatch.setattr(judging, "Judge", lambda *a: replace(real(*a), pause=0.0))
    server.statuses = [200, *[500] * 200]
    assert main([*words, server.address]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "does not answer after 4 tries: 500" in err
    assert "exact match" in out
    record = json.loads((target / "eval.json").read_text())
    assert [one["name"] for one in record["measures"]][-1] == "judge"
    assert not (target / "eval.jsonl").exists()
    kept = (target / "eval.jsonl.part").read_text()
    assert kept.count('"judge_answer": 7.0') == 1
    server.statuses, server.asked[:] = [], []
    from finray.training.evaluation import results

    monkeypatch.setattr(results, "open_located", None)  # the model is not needed any more
    assert main([*words, server.address]) == 0
    assert len(server.asked) == 4
    assert json.loads((target / "eval.json").read_text())["measures"][-1]["count"] == 5


def test_an_object_store_keeps_the_answers_of_a_silent_judge(
    run: Path, tmp_path: Path, write: Write, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The part lies there between two commands, whatever ended the first, and then goes."""

    def open_root(root: str) -> tuple[Any, str]:
        if root.startswith("s3://"):
            return pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "bucket"
        return pafs.LocalFileSystem(), "/"

    monkeypatch.setattr(storage, "_filesystem", open_root)
    real = judging.Judge
    monkeypatch.setattr(judging, "Judge", lambda *a: replace(real(*a), pause=0.0))
    data = write(tmp_path / "rows.jsonl", ROWS)

    def evaluate(model: str = "m") -> finray.EvaluationResult:
        how: dict[str, Any] = {"judge": server.address, "loss": False, "max_tokens": 2}
        return finray.evaluate(run, data, to="s3://bucket/eval?x=1", judge_model=model, **how)

    folder = tmp_path / "bucket" / "eval"
    server.statuses = [200, *[500] * 200]
    assert "does not answer" in evaluate().problems[0]
    kept = (folder / "eval.jsonl.part").read_text()
    assert kept.count('"judge_answer": 7.0') == 1
    with pytest.raises(
        InputError, match=r"^s3://bucket/eval/eval.jsonl.part\?x=1 was started with"
    ):
        evaluate("another")
    assert (folder / "eval.jsonl.part").read_text() == kept
    server.statuses, server.asked[:] = [], []
    from finray.training.evaluation import results

    with monkeypatch.context() as broken:

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        broken.setattr("finray.training.evaluation.evaluate._measured", interrupt)
        with pytest.raises(KeyboardInterrupt):
            evaluate()
    assert len(server.asked) == 4
    monkeypatch.setattr(results, "open_located", None)  # the model is not needed any more
    assert evaluate().values["judge"] == 7.0 and len(server.asked) == 4
    assert sorted(path.name for path in folder.iterdir()) == [
        "eval.html",
        "eval.json",
        "eval.jsonl",
    ]


@pytest.mark.long
def test_a_function_that_raises_costs_no_answer(
    run: Path, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The corrected one measures the answers that are there."""
    data = write(tmp_path / "rows.jsonl", ROWS)
    score = tmp_path / "score.py"

    def evaluate(body: str, max_tokens: int = 2) -> finray.EvaluationResult:
        score.write_text(f"def f(completions, **columns):\n    {body}\n")
        how: dict[str, Any] = {"loss": False, "max_tokens": max_tokens, "to": tmp_path / "eval"}
        return finray.evaluate(run, data, metrics=[f"{score}:f"], **how)

    assert "KeyError" in evaluate("raise KeyError('gone')", max_tokens=1).problems[0]
    # What is written already keeps no other evaluation from beginning.
    assert "KeyError" in evaluate("raise KeyError('gone')").problems[0]
    assert (tmp_path / "eval" / "eval.jsonl").is_file()
    from finray.training.evaluation import results

    monkeypatch.setattr(results, "open_located", None)  # the model is not needed any more
    result = evaluate("return [1.0] * len(completions)")
    assert result.values == {"f": 1.0} and "±" not in result.report.text
    assert not (tmp_path / "eval" / "eval.jsonl.part").exists()


def test_what_a_metric_writes_is_no_part_of_the_json(
    run: Path, tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    data, score = write(tmp_path / "rows.jsonl", ROWS[:1]), tmp_path / "score.py"
    score.write_text(
        "import sys\n\ndef f(completions, **columns):\n"
        "    sys.stdout.write('noise')\n    return [1.0] * len(completions)\n"
    )
    words = ["eval", str(run), "--data", str(data), "--to", str(tmp_path / "eval"), "--no-loss"]
    words += ["--metric", f"{score}:f", "--max-tokens", "1", "--quiet", "--json"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) and "noise" in err


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "{run}", "--data", "rows.jsonl"),
        ("generate", "{run}", "--prompts", "rows.jsonl", "--to", "answers.jsonl"),
        ("chat", "{run}"),
        ("chat", "{run}/checkpoints/step-00000001"),
    ],
)
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("name: x\nmodel: {base: o/b}\ndata: {train: x}\nlater: 1\n", "recipe.yaml: later: "),
        ("name: x\n", "recipe.yaml: model: "),
        ("", "recipe.yaml: missing or empty; restore it"),
    ],
)
def test_a_recipe_of_another_finray_is_one_line(
    words: tuple[str, ...],
    recipe: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = stored_run(tmp_path, "run", result="adapter")
    checkpoint(run, 1)
    (run / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    assert main([word.format(run=run) for word in words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and "the finray that wrote it" in err
    with pytest.raises(InputError, match=message):
        _ = RunResult(Folder(str(run))).recipe


def test_a_uri_is_a_folder_of_an_evaluation_and_no_file_of_answers(
    run: Path,
    tmp_path: Path,
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS[:1])
    monkeypatch.chdir(tmp_path)
    uri = f"file://{tmp_path}/eval"
    words = ["eval", str(run), "--data", str(data), "--no-loss", "--max-tokens", "2", "--quiet"]
    assert main([*words, "--to", uri]) == 0
    assert (tmp_path / "eval" / "eval.json").is_file()
    capsys.readouterr()
    generate = ["generate", str(run), "--prompts", str(data), "--to", "s3://bucket/answers.jsonl"]
    for command in (generate, ["export", str(run), "--to", "s3://bucket/model"]):
        assert main(command) == 2
        assert "expected a path on this machine, found the URI s3://" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"--to: s3://bucket/answers.jsonl is a URI"):
        finray.generate(run, data, "s3://bucket/answers.jsonl")
    assert not list(tmp_path.glob("s3*"))


def test_the_page_escapes_and_shows_the_worst_first(
    run: Path, tmp_path: Path, write: Write, read: Read
) -> None:
    score = tmp_path / "score.py"
    score.write_text(
        "def place(prompts, **columns):\n"
        "    return [-float(prompt[-1]['content'].split()[-1]) for prompt in prompts]\n"
    )
    data = write(tmp_path / "rows.jsonl", [*ROWS, {"text": "none"}])
    result = finray.evaluate(
        run, data, metrics=[f"{score}:place"], loss=False, max_tokens=2, to=tmp_path / "eval"
    )
    page = result.report.text
    places = [page.index(f"Row {number}<") for number in (5, 4, 3, 2, 1)]
    assert places == sorted(places) and "lazy dog &lt;b&gt;&amp;amp;" in page
    assert "rows.jsonl:6: " in page and result.record["answered"] == 5
    assert [line["row"] for line in read(tmp_path / "eval" / "eval.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert result.values["place"] == -2.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metric", "rogue"), "--metric: there is no metric rogue"),
        (("--judge", "here:80", "--judge-model", "m"), "--judge: here:80 is not an address"),
        (("--judge", "http://here:80"), "name the judge's model with --judge-model"),
        (("--schema", "{data}"), "--schema: cannot read"),
        (("--against", "nope"), "there is no run nope"),
        (("--against", "{run}"), "is the model that is measured; name another"),
        (("--to", "{data}"), "rows.jsonl: cannot be written: "),
        (("--to", "file://{data}/eval"), "rows.jsonl/eval: cannot be written: "),
    ],
)
def test_what_is_wrong_is_one_line(
    words: tuple[str, ...],
    message: str,
    run: Path,
    tmp_path: Path,
    write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS)
    more = [word.format(data=data, run=run) for word in words]
    assert main(["eval", str(run), "--data", str(data), *more]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err


def test_rows_that_measures_leave_out_are_counted(
    run: Path, tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", [ROWS[0], {"prompt": "quick fox"}])
    words = ["--max-tokens", "2", "--to", str(tmp_path / "eval"), "--quiet"]
    assert main(["eval", str(run), "--data", str(data), *words]) == 0
    remarks = [
        "not measured: exact match, token F1 of 1 of 2 rows without a reference answer",
        "not measured: loss, perplexity of 1 of 2 rows without an answer, or too long",
    ]
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["remarks"] == remarks
    page = (tmp_path / "eval" / "eval.html").read_text()
    for text in (capsys.readouterr().out, page):
        assert all(remark[1:] in text for remark in remarks)


def test_a_record_that_cannot_be_written_is_one_line(
    run: Path, tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", ROWS[:1])
    (tmp_path / "eval" / "eval.json").mkdir(parents=True)
    words = ["--no-loss", "--max-tokens", "2", "--to", str(tmp_path / "eval"), "--quiet"]
    assert main(["eval", str(run), "--data", str(data), *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "eval: cannot be written: Is a directory; give another" in err
