"""Fine-tuning on two Ray Train workers with TRL, as many people write it: for start_ray.py.

    ray_trl_finetune.py MODEL ROWS OUTPUT

ROWS is JSON Lines with `messages`. Prints a line after the first optimizer step.
"""

import sys
from pathlib import Path

WORKERS = 2


def train(config: dict[str, str]) -> None:
    """The training function of one worker."""
    from typing import Any  # the function travels without this module

    from datasets import load_dataset
    from peft import LoraConfig
    from ray.train.huggingface.transformers import prepare_trainer
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class PrintFirstStep(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step == 1 and state.is_world_process_zero:
                Path(config["marker"]).touch()

    trainer = SFTTrainer(
        model=config["model"],
        train_dataset=load_dataset("json", data_files=config["rows"], split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        args=SFTConfig(
            output_dir=config["output"],
            max_steps=1000,
            max_length=512,
            per_device_train_batch_size=4,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        callbacks=[PrintFirstStep()],
    )
    prepare_trainer(trainer).train()


def main() -> None:
    """Start Ray and two workers."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    model, rows, output, marker = (str(Path(path).resolve()) for path in sys.argv[1:])
    ray.init(num_cpus=WORKERS + 2)
    TorchTrainer(
        train,
        train_loop_config={"model": model, "rows": rows, "output": output, "marker": marker},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(storage_path=output),
    ).fit()


if __name__ == "__main__":
    main()
