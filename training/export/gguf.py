"""GGUF, the format of llama.cpp and Ollama, written by llama.cpp's own converter."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

from ..common.errors import InputError, RunError
from ..common.formatting import one_line

CONVERTER = "convert_hf_to_gguf.py"
_ERROR_LINES = 5
_MISSING = re.compile(r"No module named '(\w+)")


def check_converter(folder: Path) -> Path:
    """llama.cpp's converter in a checkout of it.

    Raises:
        InputError: it is not there.
    """
    script = folder.expanduser() / CONVERTER
    if not script.is_file():
        raise InputError(
            f"--llama-cpp {folder}: there is no {CONVERTER}; give a checkout of llama.cpp"
        )
    return script.absolute()


def command(script: str, model: Path, file: Path) -> list[str]:
    """What converts a model; `auto` keeps the type of its weights."""
    return [sys.executable, script, str(model), "--outfile", str(file), "--outtype", "auto"]


def shown_command(model: Path, file: Path) -> str:
    """The command for a user who has llama.cpp elsewhere."""
    words = command(f"LLAMA_CPP/{CONVERTER}", model, file)
    return shlex.join(["python", *words[1:]])


def convert(script: Path, model: Path, file: Path) -> None:
    """Convert a model.

    Raises:
        RunError: the converter fails; with the end of what it prints.
    """
    done = subprocess.run(
        command(str(script), model, file), capture_output=True, text=True, check=False
    )
    if done.returncode or not file.is_file():
        output = done.stderr or done.stdout
        lines = [one_line(line) for line in output.splitlines() if line]
        said = "\n".join(f"  {line}" for line in lines[-_ERROR_LINES:])
        missing = _MISSING.search(output)
        remedy = "A newer llama.cpp may know this architecture"
        if missing is not None:
            remedy = f"It needs a package that is not installed: pip install {missing[1]}"
        raise RunError(
            f"{CONVERTER} cannot convert the model (exit code {done.returncode}):\n{said}\n{remedy}"
        )
