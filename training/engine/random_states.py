"""Writes and reads a worker's random states: of Python, NumPy, torch's CPU and its own GPU.

transformers saves those of all GPUs that a process sees, or of one, as it is launched: a run could
then not go on where a worker sees others, or is launched in another way.
"""

import random
from pathlib import Path

import numpy as np
import torch
from transformers.trainer_pt_utils import safe_globals

from ..models.devices import get_random_state, set_random_state


def random_state_file(folder: Path, rank: int, world_size: int) -> Path:
    """The file of a worker in a checkpoint."""
    return folder / ("rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth")


def save_random_state(file: Path, device: torch.device) -> None:
    """Write the states of this process.

    Args:
        file: receives them.
        device: what the process trains on.
    """
    of_cpu, of_device = get_random_state(device)
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": of_cpu,
    }
    if of_device is not None:
        state[device.type] = of_device
    torch.save(state, file)


def load_random_state(file: Path, device: torch.device) -> None:
    """Continue with the states in a file; one of transformers holds a list of all GPUs' states, of
    which the own is known only if there is a single one."""
    with safe_globals():
        state = torch.load(file, "cpu", weights_only=True)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    own = None if device.type == "cpu" else state.get(device.type)
    if isinstance(own, list):
        own = own[0] if len(own) == 1 else None
    set_random_state(device, (state["cpu"], own))
