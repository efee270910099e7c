"""What a submitted job runs on the cluster, in the folder that `staging.stage` filled.

Only the standard library is imported here: pyarrow reads its environment when it is loaded.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Run one command; returns its exit code.

    Args:
        arguments: `train [OPTION …]` or `tune [OPTION …]` for the staged recipe or sweep,
            `pack STORAGE NAME` for the results of a run, or `doctor [STORAGE]`.
    """
    from ..environment import set_environment

    set_environment()
    verb, *rest = arguments
    if verb == "pack":
        from ...training.common.storage import Folder
        from ..jobs.results import pack

        return pack(Folder(rest[0]) / rest[1])
    if verb == "doctor":
        from ..nodes.doctor import main as examine

        return examine(rest[0] if rest else None)
    return _run_staged(verb, rest)


def _run_staged(command: str, options: Sequence[str]) -> int:
    """`finray train` or `finray tune` of what was staged."""
    from ...training.common.yaml_text import dump_yaml
    from ..jobs.staging import RECIPE_FILE, SWEEP_FILE, receive
    from .main import main as finray

    file = {"train": RECIPE_FILE, "tune": SWEEP_FILE}[command]
    path = Path.cwd() / f"resolved-{os.getpid()}.yaml"
    path.write_text(dump_yaml(receive(Path.cwd(), file)), encoding="utf-8")
    return finray([command, str(path), "--address", "auto", *options])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
