"""The settings of LLaMA-Factory's version 1 (USE_V1)."""

from .dialect import Dialect

LLAMA_FACTORY_V1 = Dialect(
    "LLaMA-Factory v1",
    {
        "cutoff_len": "data.max_length",
        "learning_rate": "optim.learning_rate",
        "max_grad_norm": "optim.max_grad_norm",
        "full_determinism": "deterministic",
        "seed": "seed",
    },
    {
        "model": ("model.base", "hub id or folder"),
        "template": ("data.chat_template", "the model's own template, unless it is set"),
        "trust_remote_code": (
            "model.trust_remote_code",
            "finray runs a model's own code only with model.revision, the full hash of a commit",
        ),
        "flash_attn": ("model.attention", "auto computes documents one at a time"),
        "bf16": ("model.dtype", "auto computes in bfloat16 where the GPU has it"),
        "enable_activation_checkpointing": (
            "model.gradient_checkpointing",
            "recompute activations",
        ),
        "peft_config": ("adapter", "lora; freeze has the section freeze"),
        "quant_config": ("model.quantize", "4 bits are nf4, 8 are int8"),
        "dist_config": ("scale.strategy: fsdp", "FSDP2 shards what DeepSpeed's ZeRO shards"),
        "train_dataset": ("data.train", "a file that lists data sets, or one data set"),
        "eval_dataset": ("data.eval", "a file that lists data sets, or one data set"),
        "output_dir": ("name", "a run's folder is <storage>/<name>"),
        "micro_batch_size": ("optim.micro_batch_size", "sequences in a forward pass"),
        "global_batch_size": ("optim.batch_size", "sequences in a step over all GPUs"),
        "num_train_epochs": ("optim.epochs", "passes over the data, unless max_steps is set"),
        "max_steps": ("optim.max_steps", "optimizer steps, instead of passes"),
        "optim_config": ("optim", "the optimizer is AdamW with states of 32 bits"),
        "lr_scheduler_config": ("optim.schedule", "constant, linear or cosine"),
        "save_steps": ("checkpoint.every_steps", "optimizer steps"),
        "save_total_limit": ("checkpoint.keep", "the best checkpoint is kept in addition"),
        "logging_steps": ("log.every_steps", "optimizer steps"),
    },
    {
        "model_class": "the kind of the model; finray reads it from config.json",
        "kernel_config batching_workers": "kernels and speed, not the result; finray has its own",
        "init_config": "where weights are read first; finray reads them where they train",
        "batching_strategy": "how rows are padded; finray pads none",
        "sample_backend max_new_tokens": "how answers are generated after the training",
        "save_epochs": "saving by passes; finray counts steps, and saves at the end",
        "save_ckpt_as_hf": "what a checkpoint is; finray writes whole ones",
        "resume_from_checkpoint": (
            "going on after a stop; the same command continues a run, --fresh starts over"
        ),
    },
    frozenset(
        "model_class peft_config kernel_config dist_config quant_config init_config train_dataset "
        "sample_backend batching_strategy optim_config lr_scheduler_config".split()
    ),
)
