"""The output of the export command."""

import io
import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from finray.cluster.screens.export import ExportProgress, render_exported
from finray.training.export.export import ExportSummary
from finray.training.export.loading import ExportedModel

RESULT = ExportedModel(
    kind="adapter",
    is_classifier=False,
    model_class="AutoModelForCausalLM",
    labels=0,
    base="acme/tiny",
    revision=None,
    quantize="none",
    has_chat_template=True,
)
EXPORTED = ExportSummary(Path("/out"), RESULT, 7, 1_234_567)


def test_what_lies_where_and_how_it_loads() -> None:
    assert render_exported(EXPORTED, as_json=False).splitlines() == [
        "/out: the adapter alone (7 files, 1.2 MB)",
        "",
        '  base = AutoModelForCausalLM.from_pretrained("acme/tiny", dtype="auto")',
        '  model = PeftModel.from_pretrained(base, "/out")',
    ]


def test_layers_that_an_adapter_reaches_by_their_weights_are_not_quantised() -> None:
    result = replace(RESULT, quantize="int8", unquantised=("mlp.up_proj",))
    assert (
        "quantization_config=BitsAndBytesConfig(load_in_8bit=True, "
        'llm_int8_skip_modules=["lm_head", "score", "mlp.up_proj"])'
    ) in result.program()


def test_json() -> None:
    values = json.loads(render_exported(EXPORTED, as_json=True))
    assert values == {
        "folder": "/out",
        "kind": "adapter",
        "base": "acme/tiny",
        "files": 7,
        "bytes": 1_234_567,
    }


def drawn(terminal: bool) -> str:
    stream = io.StringIO()
    with ExportProgress(Console(file=stream, force_terminal=terminal, width=80)) as progress:
        progress.advance(250_000, 1_000_000)
        progress.advance(1_000_000, 1_000_000)
    return stream.getvalue()


def test_a_bar_on_a_terminal_alone() -> None:
    assert "1.0/1.0 MB" in drawn(terminal=True)
    assert drawn(terminal=False) == ""
