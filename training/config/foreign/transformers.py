"""The settings of transformers' TrainingArguments, which LLaMA-Factory and TRL take by these names,
and Axolotl in part."""

COPIED = {
    "learning_rate": "optim.learning_rate",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "seed": "seed",
    "full_determinism": "deterministic",
}

STREAMING = ("data.prepare: streaming", "rows are read while the run trains, for max_steps")

COMBINED = {
    "num_train_epochs": ("optim.epochs", "passes over the data, unless max_steps is set"),
    "max_steps": ("optim.max_steps", "optimizer steps, instead of passes"),
    "per_device_train_batch_size": (
        "optim.micro_batch_size",
        "sequences in one forward pass of one worker",
    ),
    "gradient_accumulation_steps": (
        "optim.batch_size",
        "sequences in one step: microbatch x accumulation x GPUs",
    ),
    "lr_scheduler_type": ("optim.schedule", "constant, linear or cosine"),
    "warmup_ratio": ("optim.warmup_ratio", "share of the steps in which the rate rises"),
    "warmup_steps": ("optim.warmup_ratio", "finray takes a share of the steps"),
    "optim": ("optim", "the optimizer is AdamW with states of 32 bits"),
    "logging_steps": ("log.every_steps", "optimizer steps"),
    "save_steps": ("checkpoint.every_steps", "optimizer steps"),
    "save_total_limit": ("checkpoint.keep", "the best checkpoint is kept in addition"),
    "eval_steps": ("eval.every_steps", "optimizer steps"),
    "eval_strategy": ("eval.every_steps", "held-out loss is measured at the end in any case"),
    "evaluation_strategy": ("eval.every_steps", "the older name of eval_strategy"),
    "output_dir": ("name", "a run's folder is <storage>/<name>"),
    "run_name": ("name", "the run's name"),
    "report_to": ("log.to", "what is written beside metrics.jsonl"),
    "bf16": ("model.dtype", "auto computes in bfloat16 where the GPU has it"),
    "fp16": ("model.dtype: float16", "float16 is used with a gradient scaler"),
    "gradient_checkpointing": ("model.gradient_checkpointing", "recompute activations"),
    "deepspeed": ("scale.strategy: fsdp", "FSDP2 shards what ZeRO-2 and 3 shard"),
    "fsdp": ("scale.strategy: fsdp", "FSDP2"),
    "use_cpu": ("scale.gpus_per_worker: 0", "workers without a GPU"),
    "trust_remote_code": (
        "model.trust_remote_code",
        "finray runs a model's own code only with model.revision, the full hash of a commit",
    ),
}

LEFT = {
    "per_device_eval_batch_size eval_accumulation_steps prediction_loss_only batch_eval_metrics "
    "eval_do_concat_batches eval_use_gather_object eval_on_start eval_delay eval_packing "
    "bf16_full_eval fp16_full_eval": (
        "how an evaluation is computed; finray measures in batches of its own size"
    ),
    "save_strategy save_only_model save_on_each_node save_safetensors load_best_model_at_end "
    "metric_for_best_model greater_is_better enable_jit_checkpoint": (
        "what a checkpoint is; finray writes whole ones every checkpoint.every_steps as "
        "safetensors, and keeps the best on held-out data"
    ),
    "overwrite_output_dir resume_from_checkpoint ignore_data_skip "
    "restore_callback_states_from_checkpoint": (
        "going on after a stop; the same command continues a run, --fresh starts over"
    ),
    "do_train do_eval do_predict": "what the script does; finray trains, and measures at the end",
    "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision "
    "hub_model_revision push_to_hub_revision push_to_hub_model_id push_to_hub_token "
    "push_to_hub_organization": (
        "uploading to the hub; finray export --push uploads the finished result"
    ),
    "logging_dir logging_first_step logging_strategy logging_nan_inf_filter log_level "
    "log_level_replica log_on_each_node disable_tqdm debug include_num_input_tokens_seen "
    "include_tokens_per_second include_for_metrics skip_memory_metrics project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id": (
        "what is printed and logged; finray writes metrics.jsonl, a report and log.to"
    ),
    "dataloader_num_workers dataloader_drop_last dataloader_pin_memory dataloader_prefetch_factor "
    "dataloader_persistent_workers dataloader_in_order dataloader_multiprocessing_context "
    "remove_unused_columns preprocessing_num_workers preprocessing_batch_size dataset_num_proc "
    "dataset_batch_size accelerator_config split_batches dispatch_batches": (
        "how rows are read; finray streams them from prepared data"
    ),
    "group_by_length length_column_name train_sampling_strategy data_seed shuffle_dataset": (
        "the order of the rows; finray shuffles them by its seed, and packs by length"
    ),
    "ddp_timeout ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap "
    "parallelism_config local_rank world_size": (
        "how workers communicate; finray sets that up itself (scale.hang_timeout: what a hang is)"
    ),
    "gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs "
    "activation_offloading use_reentrant_gc torch_empty_cache_steps use_cache": (
        "how activations are recomputed; model.gradient_checkpointing is the only choice"
    ),
    "optim_args optim_target_modules adam_epsilon": (
        "details of the optimizer; finray has AdamW with an epsilon of 1e-8"
    ),
    "lr_scheduler_kwargs": "details of a schedule; finray's end at zero",
    "label_smoothing_factor": "smoothed labels of the cross-entropy, which finray does not have",
    "neftune_noise_alpha noisy_embedding_alpha": (
        "noise on embeddings (NEFTune), which finray does not have"
    ),
    "label_names average_tokens_across_devices": (
        "how the loss is averaged; finray's means go over the whole batch"
    ),
    "auto_find_batch_size": (
        "a smaller microbatch when memory runs out; finray halves it by itself then"
    ),
    "torch_compile torch_compile_backend torch_compile_mode tf32 use_liger_kernel use_liger "
    "liger_kernel_config use_mps_device no_cuda jit_mode_eval use_ipex half_precision_backend "
    "fp16_opt_level fp16_backend": (
        "how the device computes: speed and memory, not the result; finray has its own kernels"
    ),
    "ray_scope": "Ray Tune's; see finray tune",
}
