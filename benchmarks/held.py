"""Prints the bytes of parameters and buffers in memory after a step's batches are made.

    held.py JOB

Used by methods.py. All existing modules are counted, so a frozen copy of the model would
show.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from contenders import Job, recipe_of
from measure import print_result
from trl_methods import first_model, in_order

from finray.training.common.storage import Folder
from finray.training.data.prepared import Prepared, open_prepared
from finray.training.engine.methods import objective_of
from finray.training.objectives.objective import Setup


def main() -> None:
    """Build the objective, let it prepare a step, and count the bytes."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    recipe, data = recipe_of(job), open_prepared(Folder(job.prepared))
    assert isinstance(data, Prepared)
    model, cpu = first_model(recipe), torch.device("cpu")
    objective = objective_of(Setup(recipe, model, None, data, 0, 1, cpu))
    with torch.no_grad():
        objective.batches(0, in_order(recipe, data, 1))
    print_result(bytes_held())


def bytes_held() -> int:
    """Bytes of the parameters and buffers of all modules in this process; shared storages once."""
    storages: dict[int, int] = {}
    for module in gc.get_objects():
        if isinstance(module, torch.nn.Module):
            for tensor in (*module.parameters(False), *module.buffers(False)):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


if __name__ == "__main__":
    main()
