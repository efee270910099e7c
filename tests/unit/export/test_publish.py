"""Publishing: the hub's API at the wire, Ollama's template, GGUF, and quantised weights."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from support.chat_templates import NAMES, template, tokenizer_with
from support.finished_run import finished_run
from support.model_hub import TOKEN, ModelHub, model_hub
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from finray.cluster.api.runs import export
from finray.cluster.cli.main import main
from finray.training.common.errors import InputError, RunError
from finray.training.data.chat import chat_template_of
from finray.training.export.gguf import convert
from finray.training.export.ollama import TurnTexts, turn_texts

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Bye?"},
]
CONVERTER = """
import pathlib, sys
model, _, file, *rest = sys.argv[1:]
assert rest == ["--outtype", "auto"] and (pathlib.Path(model) / "model.safetensors").exists()
pathlib.Path(file).write_bytes(b"GGUF")
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    with model_hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def push(run: Path, name: str = "acme/support", **how: Any) -> Any:
    return export(run, push=name, quiet=True, **how)


def test_a_run_is_pushed_to_a_private_repository(
    tiny_model: Path, tmp_path: Path, hub: ModelHub
) -> None:
    run = finished_run(tmp_path, tiny_model)
    pushed = push(run).pushed
    assert pushed == f"{hub.url}/acme/support" and hub.private == {"acme/support": True}
    files = hub.files["acme/support"]
    assert (
        files["adapter_model.safetensors"]
        == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    assert {"README.md", "adapter_config.json", "tokenizer.json"} <= files.keys()
    assert str(tmp_path).encode() not in files["README.md"]
    push(run, "acme/open", public=True)
    assert hub.private["acme/open"] is False


def test_what_the_hub_refuses_is_said_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, hub: ModelHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path, tiny_model)
    with pytest.raises(InputError, match="add --merge"):
        push(run, ollama=True)
    (run / "adapter" / "chat_template.jinja").write_text("{{ messages | tojson }}")
    with pytest.raises(InputError, match="does more than put texts around turns"):
        push(run, merge=True, ollama=True)
    assert not hub.private, "no repository is made for what is refused"
    hub.private["acme/support"] = False
    with pytest.raises(InputError, match=r"exists and is public; add --public"):
        push(run, to=tmp_path / "out")
    with pytest.raises(InputError, match=r"--push a/b/c: "):
        push(run, "a/b/c")
    hub.refuses = 403
    with pytest.raises(InputError, match=r"the hub refuses \(403\).*set HF_TOKEN"):
        push(run, "acme/new", to=tmp_path / "out")
    hub.refuses = 500
    with pytest.raises(RunError, match=r"the hub cannot be reached"):
        push(run, "acme/new", to=tmp_path / "out")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE is set; unset it to upload"):
        push(run, "acme/new")
    assert not (tmp_path / "out").exists() and hub.files == {}


def go_rendering(texts: TurnTexts, talk: list[dict[str, str]]) -> str:
    """What Ollama makes of the written template, whose only constructs are these."""
    source, system = texts.go(), talk[0]["role"] == "system"
    source = re.sub(
        r"\{\{ if not \.System \}\}(.*?)\{\{ end \}\}", "" if system else r"\1", source, flags=re.S
    )
    head, _, rest = source.partition("{{ range .Messages }}")
    loop, _, tail = rest.partition("{{ end }}{{ end }}")
    parts = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)(?=\{\{ else|\Z)', loop, flags=re.S))
    turns = [parts[turn["role"]].replace("{{ .Content }}", turn["content"]) for turn in talk]
    return head + "".join(turns) + tail


@pytest.mark.parametrize("name", NAMES)
def test_ollamas_template_is_the_chat_template(name: str) -> None:
    """It renders as the chat template does, or is refused."""
    tokenizer = tokenizer_with(template(name))
    try:
        texts = turn_texts(tokenizer)
    except InputError as error:
        assert "does more than put texts around turns" in str(error)
        return
    chat = chat_template_of(tokenizer, None)
    for talk in (TALK, TALK[1:], TALK[:2]):
        expected = chat.render(talk, add_generation_prompt=True)
        assert go_rendering(texts, talk) == expected.removeprefix(tokenizer.bos_token or "")


def test_a_modelfile_and_gguf(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, tiny_model)
    (tmp_path / "llama").mkdir()
    script = tmp_path / "llama" / "convert_hf_to_gguf.py"
    script.write_text(CONVERTER, encoding="utf-8")
    out = tmp_path / "out"
    whole = {"merge": True, "format": "gguf", "quiet": True}
    export(run, out, llama_cpp=tmp_path / "llama", ollama=True, **whole)
    modelfile = (out / "Modelfile").read_text(encoding="utf-8")
    assert (out / "out.gguf").read_bytes() == b"GGUF" and "FROM ./out.gguf\n" in modelfile
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert f"PARAMETER stop {json.dumps(tokenizer.eos_token)}" in modelfile
    words = ["export", str(run), "--to", str(tmp_path / "ready"), "--format", "gguf", "--merge"]
    assert main(["--quiet", *words, "--ollama"]) == 0
    ready = (tmp_path / "ready" / "Modelfile").read_text(encoding="utf-8")
    assert "FROM ./ready.gguf\n" in ready, "what the command that is printed writes"
    said = capsys.readouterr().out
    assert f"python LLAMA_CPP/convert_hf_to_gguf.py {tmp_path}/ready --outfile" in said
    script.write_text("import sys; sys.exit('Model XForCausalLM is not supported')")
    with pytest.raises(RunError, match=r"(?s)exit code 1.*XForCausalLM is not supported"):
        export(run, tmp_path / "failed", llama_cpp=tmp_path / "llama", **whole)
    assert not (tmp_path / "failed").exists()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"ollama": True}, "--ollama takes a whole model, .* add --merge"),
        ({"format": "gguf"}, "--format gguf takes a whole model"),
        ({"quantize": "nf4"}, "--quantize takes a whole model"),
        ({"llama_cpp": "x"}, "--llama-cpp is for --format gguf"),
        ({"public": True}, "--public is for --push OWNER/NAME; add that"),
        ({"llama_cpp": "x", "format": "gguf"}, "there is no convert_hf_to_gguf.py"),
        ({"quantize": "nf4", "format": "gguf"}, "--quantize contradicts --format gguf"),
        ({"quantize": "nf4", "ollama": True}, "--quantize contradicts --ollama"),
    ],
)
def test_refused(tiny_model: Path, tmp_path: Path, how: dict[str, Any], message: str) -> None:
    run = finished_run(tmp_path, tiny_model)
    with pytest.raises(InputError, match=message):
        export(run, tmp_path / "out", quiet=True, **how)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_quantised_weights_load_and_say_nearly_the_same(
    tiny_model: Path, tmp_path: Path, scheme: Any
) -> None:
    # On CPUs with AVX-512, bitsandbytes reads 4-bit rows of 64 weights alone rightly.
    config = AutoConfig.from_pretrained(tiny_model, hidden_size=64, head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    run = finished_run(tmp_path, tmp_path / "base")
    plain = export(run, tmp_path / "plain", merge=True, quiet=True)
    small = export(run, tmp_path / scheme, merge=True, quantize=scheme, quiet=True)
    assert small.bytes < plain.bytes
    ids = torch.arange(3, 40).view(1, -1)
    logits = []
    for folder in (plain.folder, small.folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": "cpu"})
        logits.append(model(ids).logits.float())
    assert model.config.quantization_config is not None
    assert torch.nn.functional.cosine_similarity(*logits, dim=-1).mean() > 0.9
    card = (small.folder / "README.md").read_text(encoding="utf-8")
    assert f"- Weights: {scheme}, as bitsandbytes stores them" in card


def test_a_converter_without_its_packages_names_them(tmp_path: Path) -> None:
    """As llama.cpp's does without sentencepiece, whose own advice would be a newer llama.cpp."""
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import not_there.at_all\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"not installed: pip install not_there$"):
        convert(script, tmp_path, tmp_path / "out.gguf")
