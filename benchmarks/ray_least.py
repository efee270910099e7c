"""The least that two Ray Train workers do before they train: for start_ray.py.

    ray_least.py OUTPUT MARKER

Ray without its dashboard starts them; they meet, and load what a fine-tuning loads: torch,
transformers' Trainer and peft. No data, no model, no step. Then the file TOLD is there.
"""

import sys
from pathlib import Path

WORKERS = 2


def train(config: dict[str, str]) -> None:
    """The training function of one worker."""
    import peft  # noqa: F401
    import ray.train
    import torch.distributed as dist
    from transformers import Trainer  # noqa: F401

    dist.barrier()
    if ray.train.get_context().get_world_rank() == 0:
        Path(config["marker"]).touch()
    dist.barrier()


def main() -> None:
    """Start Ray and two workers."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    output, marker = (str(Path(path).resolve()) for path in sys.argv[1:])
    ray.init(num_cpus=WORKERS, include_dashboard=False)
    TorchTrainer(
        train,
        train_loop_config={"marker": marker},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(storage_path=output),
    ).fit()


if __name__ == "__main__":
    main()
