"""`finray export`: writes a finished run's result into a self-contained folder."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..common.errors import InputError, RunError, reason
from ..common.progress import SILENT, Progress
from ..common.storage import Folder
from ..config.adapter_folder import CONFIG_FILE as ADAPTER_CONFIG
from ..config.adapter_folder import WEIGHTS_FILE, is_base_unchanged
from ..config.base_digest import BASE_FILE
from ..config.model_folder import model_folder, processor_files, tokenizer_files
from ..config.models import ModelSettings
from ..config.places import about
from ..records.run_folder import RECIPE_FILE, Record, finished_run
from .gguf import convert
from .loading import ExportedModel
from .model_card import render_card
from .ollama import check_template, write_modelfile
from .quantising import quantise

if TYPE_CHECKING:
    from ..models.dtypes import DtypeName

CARD_FILE = "README.md"
MODEL_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_CLASSES = {False: "AutoModelForCausalLM", True: "AutoModelForSequenceClassification"}
"""What loads the results of runs whose run.json names no class."""


@dataclass(frozen=True)
class ExportSummary:
    """The folder that an export wrote."""

    folder: Path
    result: ExportedModel
    files: int
    """Number of files."""
    bytes: int
    """Size of all files together."""
    pushed: str | None = None
    """Address of the repository that it was uploaded to."""


def export(
    run: Folder,
    target: Path,
    *,
    merge: bool = False,
    dtype: "DtypeName | None" = None,
    quantize: Literal["nf4", "int8"] | None = None,
    for_gguf: bool = False,
    converter: Path | None = None,
    ollama: bool = False,
    before_writing: Callable[[], None] = lambda: None,
    progress: Progress = SILENT,
) -> ExportSummary:
    """Write a run's result and its model card into a folder, completely or not at all.

    Args:
        run: the run's folder.
        target: the folder to write; it must not exist, or be empty.
        merge: merge the adapter into its base.
        dtype: type of the written weights; by default that of the base or the trained model.
        quantize: store a whole model's weights quantised, as bitsandbytes reads them.
        for_gguf: the folder is to be converted to GGUF, so it must hold a whole model.
        converter: llama.cpp's, which writes <name of the folder>.gguf beside the weights.
        ollama: write a Modelfile for a whole model.
        before_writing: called when all of it was checked.
        progress: receives the bytes of weights written so far and in all.

    Raises:
        InputError: there is no finished run, nothing to merge, no base, or no space on the disk.
        RunError: the result cannot be written, or a merged weight is not finite.
    """
    finished = finished_run(run)
    record, recipe, name = finished.record, finished.recipe, finished.kind
    if name == "model" and merge:
        raise InputError(f"{run}: the run trained the full model, not an adapter; omit --merge")
    if name == "adapter" and not merge:
        _check_of_adapter(dtype, quantize, for_gguf, ollama)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already; give a new or empty folder")
    settings = recipe["model"]
    base = None
    if merge:
        model = ModelSettings(base=settings["base"], revision=settings.get("revision"))
        with about(str(run / RECIPE_FILE)):
            base = model_folder(model, weights=True)
    with _staged(target) as staged, finished.local_result() as trained:
        _check_result(trained, base, ollama)
        before_writing()
        if base is not None:
            _merge(record, settings, base, trained, staged, dtype, progress)
        elif dtype is not None:
            _recast(trained, staged, dtype, progress)
        else:
            shutil.copytree(trained, staged, dirs_exist_ok=True)
            if name == "adapter":
                _write_base_name(staged, settings)
        result = replace(
            _describe(name, merge, record, settings, trained), stored=quantize or "none"
        )
        if quantize is not None:
            trust = settings.get("trust_remote_code", False)
            quantise(staged, quantize, result.model_class, trust)
        gguf = f"{target.name}.gguf"
        if converter is not None:
            progress.status("llama.cpp converts the model")
            convert(converter, staged, staged / gguf)
        if ollama:
            write_modelfile(staged, f"./{gguf}" if for_gguf else ".")
        card = render_card(record, recipe, result)
        (staged / CARD_FILE).write_text(card, encoding="utf-8")
        sizes = [path.stat().st_size for path in staged.rglob("*") if path.is_file()]
    return ExportSummary(target, result, len(sizes), sum(sizes))


def _check_of_adapter(
    dtype: "DtypeName | None", quantize: str | None, for_gguf: bool, ollama: bool
) -> None:
    """Refuse what an adapter alone cannot become."""
    if dtype is not None:
        raise InputError("--dtype sets the type of a full model's weights; add --merge")
    extras = {"--quantize": quantize, "--format gguf": for_gguf, "--ollama": ollama}
    for option, is_asked in extras.items():
        if is_asked:
            raise InputError(
                f"{option} takes a whole model, and the run trained an adapter; add --merge"
            )


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A temporary folder next to the target, renamed to the target at the end.

    The next export deletes the folder that a killed one leaves behind.
    """
    staged = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"{target}: cannot write there: {reason(error)}; give another folder"
        ) from None
    try:
        yield staged
        staged.replace(target)
    except OSError as error:
        raise RunError(
            f"{target}: the export failed: {reason(error)}; make room there or give another "
            "folder, and run the same command"
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _merge(
    record: Record,
    settings: Record,
    base: Path,
    adapter: Path,
    staged: Path,
    dtype: "DtypeName | None",
    progress: Progress,
) -> None:
    from transformers import AutoTokenizer

    from .merge import merge

    merge(
        base,
        adapter,
        staged,
        progress,
        quantize=settings.get("quantize", "none"),
        compute_dtype=record["dtype"],
        dtype=dtype,
        pad_token_id=AutoTokenizer.from_pretrained(
            adapter, trust_remote_code=settings.get("trust_remote_code", False)
        ).pad_token_id,
    )
    _copy_existing(tokenizer_files(adapter), staged)
    _copy_existing(processor_files(base), staged)
    _copy_existing([base / GENERATION_CONFIG, adapter / GENERATION_CONFIG], staged)


def _recast(model: Path, staged: Path, dtype: "DtypeName", progress: Progress) -> None:
    from .merge import recast

    recast(model, staged, dtype, progress)
    files = [*tokenizer_files(model), *processor_files(model), model / GENERATION_CONFIG]
    _copy_existing(files, staged)


def _copy_existing(files: list[Path], target: Path) -> None:
    """Copy the files that exist; of the same name the last one."""
    for file in files:
        if file.is_file():
            shutil.copy(file, target)


def _write_base_name(adapter: Path, settings: Record) -> None:
    """Write the recipe's base into PEFT's configuration, and no local path into the digest file."""
    base = settings["base"]
    _change_json(
        adapter / ADAPTER_CONFIG,
        base_model_name_or_path=base,
        revision=settings.get("revision"),
    )
    if (adapter / BASE_FILE).is_file() and Path(base).is_absolute():
        _change_json(adapter / BASE_FILE, base=Path(base).name)


def _check_result(trained: Path, base: Path | None, ollama: bool) -> None:
    """Refuse a result that cannot be merged, or for which no Modelfile can be written."""
    if base is not None:
        _check_base(base, trained)
    if ollama:
        check_template(trained)


def _check_base(base: Path, adapter: Path) -> None:
    """Refuse a base whose weights have changed since the adapter was trained."""
    if not is_base_unchanged(adapter, base, "export"):
        raise InputError(
            f"{base}: the base's weights have changed since the adapter was trained; "
            "merge needs the original weights"
        )


def _describe(
    name: str, merge: bool, record: Record, settings: Record, trained: Path
) -> ExportedModel:
    from transformers import AutoTokenizer

    if name == "adapter":
        is_classifier = _read_json(trained / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"
        labels = _score_outputs(trained) if is_classifier else 0
    else:
        config = _read_json(trained / MODEL_CONFIG)
        is_classifier = str(config["architectures"][0]).endswith("ForSequenceClassification")
        labels = len(config.get("id2label") or ())
    trust = settings.get("trust_remote_code", False)
    template = AutoTokenizer.from_pretrained(trained, trust_remote_code=trust).chat_template
    return ExportedModel(
        kind="merged" if merge else "adapter" if name == "adapter" else "model",
        is_classifier=is_classifier,
        model_class=record.get("model_class") or _CLASSES[is_classifier],
        labels=labels,
        base=settings["base"],
        revision=settings.get("revision"),
        quantize=settings.get("quantize", "none"),
        has_chat_template=template is not None,
        rows=record.get("embedding_rows"),
        has_stops=name == "adapter" and (trained / GENERATION_CONFIG).is_file(),
        unquantised=_unquantised(trained) if name == "adapter" else (),
    )


def _unquantised(adapter: Path) -> tuple[str, ...]:
    """The layers that PEFT reaches by their weights, by the endings of their names."""
    parameters = _read_json(adapter / ADAPTER_CONFIG).get("target_parameters") or ()
    return tuple(n.removesuffix(".weight") for n in sorted(parameters) if n.endswith(".weight"))


def _score_outputs(adapter: Path) -> int:
    """Number of outputs of the score head that is saved with an adapter."""
    from safetensors import safe_open

    with safe_open(adapter / WEIGHTS_FILE, framework="np") as file:
        head = next(name for name in file.keys() if name.endswith("score.weight"))  # noqa: SIM118
        return int(file.get_slice(head).get_shape()[0])


def _read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _change_json(path: Path, **values: Any) -> None:
    changed = {**_read_json(path), **values}
    path.write_text(json.dumps(changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
