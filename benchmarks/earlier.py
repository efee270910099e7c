"""finray at an earlier commit, beside this one: each prepares its data and runs its own worker."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import HERE, child_environment, last_line

_PREPARE = """
import dataclasses, json, pathlib, sys
from throughput import prepared_job
folder, *arguments = json.loads(sys.argv[1])
print(json.dumps(dataclasses.asdict(prepared_job(pathlib.Path(folder), *arguments))))
"""
_TRAIN = """
import contextlib, io, json, resource, runpy, sys
sys.path.insert(0, ".")
sys.argv = ["contenders.py", "finray", sys.argv[1]]
with contextlib.redirect_stdout(io.StringIO()) as printed:
    runpy.run_path("contenders.py", run_name="__main__")
result = json.loads(printed.getvalue().strip().splitlines()[-1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({**result, "peak_mb": peak}))
"""


def checked_out(commit: str, folder: Path) -> Path:
    """The files of a commit, in a package `finray` in a folder.

    Returns:
        The package's folder.

    Raises:
        SystemExit: this clone lacks the commit.
    """
    target = folder / "finray"
    target.mkdir(parents=True)
    archive = subprocess.run(
        ["git", "archive", commit], cwd=HERE.parent, check=False, capture_output=True
    )
    if archive.returncode:
        raise SystemExit(f"{commit}: git archive: {archive.stderr.decode().strip()}")
    subprocess.run(["tar", "-x", "-C", str(target)], input=archive.stdout, check=True)
    return target


class Version:
    """finray as a package's folder has it.

    Args:
        package: the folder; this checkout's by default.
    """

    def __init__(self, package: Path = HERE.parent) -> None:
        self._benchmarks = package / "benchmarks"
        self._env = child_environment()
        if package != HERE.parent:
            self._env["PYTHONPATH"] = str(package.parent)

    def prepare(self, folder: Path, values: dict[str, Any], *sizes: int) -> Path:
        """Prepare a recipe's data, under `folder`.

        Args:
            folder: for the job and all that it writes.
            values: the recipe, without `storage`.
            sizes: the job's steps, its steps before the timed ones, and its threads.

        Returns:
            The file of the job.
        """
        folder.mkdir(parents=True)
        recipe = {**values, "storage": str(folder / "runs")}
        job = self._answer("-c", _PREPARE, json.dumps([str(folder), recipe, *sizes]))
        file = folder / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        return file

    def train(self, job: Path, threads: int) -> dict[str, Any]:
        """What its worker measures of a job, in a process of its own, and that process's peak."""
        self._env["OMP_NUM_THREADS"] = str(threads)
        result: dict[str, Any] = self._answer("-c", _TRAIN, str(job))
        return result

    def _answer(self, *arguments: str) -> Any:
        command = [sys.executable, *arguments]
        return last_line(command, self._env, self._benchmarks)


def full_name(commit: str) -> str:
    """The commit's whole hash."""
    text = subprocess.check_output(
        ["git", "rev-parse", f"{commit}^{{commit}}"], cwd=HERE, text=True
    )
    return text.strip()
