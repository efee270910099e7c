"""TRL's settings, and those of the alignment handbook, whose files are TRL's."""

from .dialect import Dialect
from .transformers import COMBINED, COPIED, LEFT, STREAMING

TRL = Dialect(
    "TRL",
    {
        **COPIED,
        "lora_r": "adapter.rank",
        "lora_alpha": "adapter.alpha",
        "lora_dropout": "adapter.dropout",
        "use_dora": "adapter.dora",
        "use_rslora": "adapter.rslora",
        "max_length": "data.max_length",
        "max_seq_length": "data.max_length",
        "max_completion_length": "method.max_completion",
        "num_generations": "method.generations",
        "mask_truncated_completions": "method.mask_truncated",
        "temperature": "method.temperature",
        "top_p": "method.top_p",
        "top_k": "method.top_k",
        "epsilon": "method.epsilon",
        "epsilon_high": "method.epsilon_high",
        "num_iterations": "method.passes",
        "normalize_advantages": "method.normalize_advantages",
        "desirable_weight": "method.desirable_weight",
        "undesirable_weight": "method.undesirable_weight",
        "center_rewards_coefficient": "method.center_coefficient",
        "label_smoothing": "method.label_smoothing",
        "discopop_tau": "method.discopop_tau",
        "f_divergence_type": "method.divergence",
        "f_alpha_divergence_coef": "method.divergence_alpha",
        "precompute_ref_log_probs": "method.precompute_reference",
        "simpo_gamma": "method.gamma",
        "cpo_alpha": "method.sft_weight",
    },
    {
        **COMBINED,
        "model_name_or_path": ("model.base", "hub id or folder"),
        "model_revision": ("model.revision", "a commit, tag or branch"),
        "tokenizer_name_or_path": ("model.base", "the tokenizer is the model folder's own"),
        "dtype": ("model.dtype", "compute type"),
        "torch_dtype": ("model.dtype", "the older name of dtype"),
        "attn_implementation": ("model.attention", "auto computes documents one at a time"),
        "use_flash_attention_2": ("model.attention", "auto computes documents one at a time"),
        "use_peft": ("adapter: lora", "a LoRA adapter"),
        "lora_target_modules": ("adapter.targets", "all-linear, names, or a regular expression"),
        "lora_target_parameters": ("adapter.targets", "names of experts' parameters"),
        "lora_modules_to_save": ("adapter.modules_to_save", "modules that are trained whole"),
        "load_in_4bit": ("model.quantize: nf4", "the frozen base in 4 bits"),
        "load_in_8bit": ("model.quantize: int8", "the frozen base in 8 bits"),
        "dataset_name": ("data.train", "a data set of the hub, or a path"),
        "dataset_config": ("data.train.0.subset", "a configuration of the data set"),
        "dataset_config_name": ("data.train.0.subset", "a configuration of the data set"),
        "dataset_train_split": ("data.train.0.split", "train is the default"),
        "dataset_test_split": ("data.eval: {split: test}", "held-out rows"),
        "datasets": ("data.train", "a list of sources"),
        "dataset_mixture": ("data.train", "a list of sources with weights"),
        "dataset_mixer": ("data.train", "sources with the share of each that is used"),
        "dataset_splits": ("data.train.0.split", "the first is trained, test splits are held out"),
        "dataset_configs": ("data.train.0.subset", "a configuration of each data set"),
        "test_split_size": ("data.holdout", "share of the rows that is held out"),
        "dataset_text_field": ("data.train.0.columns: {text: NAME}", "the column of plain text"),
        "text_column": ("data.train.0.columns: {text: NAME}", "the column of plain text"),
        "system_prompt": ("data.train.0.system", "for conversations without one"),
        "chat_template": ("data.chat_template", "a Jinja text; else the model's own"),
        "chat_template_path": ("data.chat_template", "a Jinja file; else the model's own"),
        "eos_token": ("data.chat_template", "an answer ends as the chat template writes it"),
        "packing": ("data.packing", "several documents in a sequence, kept apart"),
        "packing_strategy": ("data.packing", "wrapped mixes documents, finray keeps them apart"),
        "truncation_mode": ("data.overlong", "keep_start is truncate, keep_end truncate_left"),
        "completion_only_loss": ("method.train_on", "completions or all"),
        "assistant_only_loss": ("method.train_on", "completions or all"),
        "max_prompt_length": ("data.max_length", "prompts share it with their completions"),
        "loss_type": ("method.losses", "method.loss of kto and grpo"),
        "loss_weights": ("method.losses", "losses and their weights"),
        "rpo_alpha": ("method.losses: {sigmoid: 1, sft: X}", "the chosen answer's cross-entropy"),
        "beta": ("method.beta", "distance from the reference, or scale"),
        "reward_funcs": ("method.rewards", 'functions {file: "rewards.py:name"}, or {trl: NAME}'),
        "reward_model_name_or_path": ("method.rewards", "{model: NAME}"),
        "reward_model_path": ("method.rewards", "{model: NAME}"),
        "reward_weights": ("method.rewards", "each reward has a weight"),
        "scale_rewards": ("method.scale_rewards", "group, batch or none"),
        "use_vllm": ("method.rollout: vllm", "vLLM samples, beside an adapter"),
        "dataset_prompt_column": ("data.train.0.columns", "the column of the prompt"),
        "num_processes": ("scale.workers", "a worker trains on one GPU"),
        "nproc_per_node": ("scale.workers", "a worker trains on one GPU"),
        "accelerate_config": ("scale.workers", "the processes of accelerate's file"),
        "sft_model_path": ("model.base", "the model to start from"),
        "gradient_accumulation": ("optim.batch_size", "sequences in one step"),
        **dict.fromkeys(("streaming", "dataset_streaming"), STREAMING),
    },
    {
        **LEFT,
        "teacher_model_name_or_path teacher_model_revision teacher_model_init_kwargs lmbda": (
            "distillation from a teacher, which finray does not have"
        ),
        "env": "variables of the environment; set them where finray runs",
        "dataset_kwargs dataset_revision skip_prepare_dataset max_seq_len pad_to_multiple_of "
        "pad_token pad_to_sequence_len padding_free max_packed_sequence_len "
        "auto_insert_empty_system_msg add_special_tokens append_concat_token num_of_sequences": (
            "how rows are padded; finray pads none"
        ),
        "model_init_kwargs ref_model_init_kwargs router_aux_loss_coef disable_dropout "
        "cast_lm_head_to_fp32 ignore_bias_buffers model_code_revision": (
            "how the model is loaded; finray loads it as its config.json says"
        ),
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage "
        "bnb_4bit_compute_dtype": "details of 4 bits; finray has NF4 with double quantisation",
        "lora_task_type": "the kind of head, which follows from the method",
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps use_weighting ld_alpha "
        "reference_free force_use_ref_model is_encoder_decoder label_pad_token_id padding_value "
        "precompute_ref_batch_size use_logits_to_keep base_model_attribute_name "
        "model_adapter_name ref_adapter_name generate_during_eval max_target_length tools "
        "reward_clip_range": "details of its trainers that finray does not have",
        "generation_batch_size steps_per_generation num_generations_eval generation_kwargs "
        "chat_template_kwargs min_p repetition_penalty cache_implementation "
        "ds3_gather_for_generation max_tool_calling_iterations "
        "use_transformers_continuous_batching transformers_continuous_batching_config "
        "use_transformers_paged max_new_tokens response_length stop_token missing_eos_penalty "
        "local_rollout_forward_batch_size num_sample_generations": (
            "details of sampling; finray has temperature, top_p, top_k and rollout_batch_size"
        ),
        "vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
        "vllm_guided_decoding_regex vllm_server_base_url vllm_server_host vllm_server_port "
        "vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
        "vllm_max_model_len vllm_tensor_parallel_size vllm_device vllm_dtype "
        "vllm_enable_prefix_caching vllm_importance_sampling_correction "
        "vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
        "vllm_importance_sampling_clip_min vllm_importance_sampling_cap": (
            "vLLM's engine, which finray configures itself"
        ),
        "delta sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg "
        "vespo_lambda_neg importance_sampling_level multi_objective_aggregation "
        "top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min "
        "entropy_coef_max entropy_coef_delta entropy_target off_policy_mask_threshold "
        "use_bias_correction_kl": "variants of GRPO that finray does not have",
        "log_completions log_multimodal num_completions_to_print log_unique_prompts "
        "log_completions_hub_repo": "printing completions; eval.samples puts some into the report",
        "image_column max_num_images max_image_size": (
            "images; finray trains text alone, and refuses rows that hold any"
        ),
        "callbacks benchmarks wandb_entity wandb_project "
        "wandb_run_group wandb_log_unique_prompts overwrite_hub_revision": (
            "settings of a script around TRL; finray has columns in a source, and log.to"
        ),
        "config_file main_process_port machine_rank num_machines mixed_precision dynamo_backend "
        "main_process_ip rdzv_backend rdzv_endpoint master_port nnodes node_rank "
        "compute_environment distributed_type num_cpu_threads_per_process zero_stage "
        "deepspeed_config_file standalone launcher gpu_ids "
        "same_network main_training_function downcast_bf16 enable_cpu_affinity tpu_env "
        "tpu_use_cluster tpu_use_sudo parallelism_config_cp_size": (
            "accelerate's and torchrun's; finray has scale, and finray job submit for a cluster"
        ),
        "use_deepspeed multi_gpu use_fsdp": "how workers share the model; see scale.strategy",
        "config": "the file that a command reads its settings from",
        "sanity_check exp_name track kto_ftx judge reward_server_url": "settings of a script",
    },
    frozenset(
        "dataset_name dataset_mixture dataset_mixer dataset_train_split dataset_test_split "
        "use_peft max_completion_length num_generations completion_only_loss assistant_only_loss "
        "dataset_text_field max_prompt_length reward_funcs dataset_config max_seq_length "
        "truncation_mode desirable_weight undesirable_weight lora_task_type dataset_splits "
        "reward_model_name_or_path dataset_streaming".split()
    ),
)
