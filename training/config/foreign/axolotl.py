"""Axolotl's settings."""

from .dialect import Dialect
from .transformers import COMBINED, COPIED, LEFT, STREAMING

_RATE = ("learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "seed")

_SHARED = (
    *("max_steps", "gradient_accumulation_steps", "warmup_ratio", "warmup_steps"),
    *("logging_steps", "save_steps", "save_total_limit", "eval_steps", "eval_strategy"),
    *("evaluation_strategy", "output_dir", "bf16", "fp16", "gradient_checkpointing", "deepspeed"),
    *("fsdp", "trust_remote_code"),
)

AXOLOTL = Dialect(
    "Axolotl",
    {
        **{name: COPIED[name] for name in _RATE},
        "sequence_len": "data.max_length",
        "lora_r": "adapter.rank",
        "lora_alpha": "adapter.alpha",
        "lora_dropout": "adapter.dropout",
        "peft_use_dora": "adapter.dora",
        "peft_use_rslora": "adapter.rslora",
        "loraplus_lr_ratio": "optim.lora_plus_ratio",
        "revision_of_model": "model.revision",
        "kto_desirable_weight": "method.desirable_weight",
        "kto_undesirable_weight": "method.undesirable_weight",
        "full_determinism": "deterministic",
        "precompute_ref_log_probs": "method.precompute_reference",
        "lora_rank_pattern": "adapter.rank_pattern",
        "lora_alpha_pattern": "adapter.alpha_pattern",
    },
    {
        **{name: COMBINED[name] for name in _SHARED},
        "base_model": ("model.base", "hub id or folder"),
        "adapter": ("adapter", "lora; qlora is lora with model.quantize: nf4"),
        "load_in_4bit": ("model.quantize: nf4", "the frozen base in 4 bits"),
        "load_in_8bit": ("model.quantize: int8", "the frozen base in 8 bits"),
        "lora_target_linear": ("adapter.targets: all-linear", "every linear layer"),
        "lora_target_modules": ("adapter.targets", "names of layers, or a regular expression"),
        "lora_target_parameters": ("adapter.targets", "names of experts' parameters"),
        "lora_modules_to_save": ("adapter.modules_to_save", "modules that are trained whole"),
        "lora_model_dir": ("model.adapter", "an adapter to train on"),
        "peft_init_lora_weights": ("adapter.init", "first values of the adapter"),
        "peft": ("adapter.init: loftq", "LoftQ"),
        "unfrozen_parameters": ("freeze.train", "names of the weights that are trained"),
        "datasets": ("data.train", "a list of sources"),
        "test_datasets": ("data.eval", "a list of sources"),
        "pretraining_dataset": ("data.train", "plain text, with method: pretrain"),
        "val_set_size": ("data.holdout", "share of the rows that is held out"),
        "split": ("data.train.0.split", "a split of a data set"),
        "sample_packing": ("data.packing", "several documents in a sequence, kept apart"),
        "excess_length_strategy": ("data.overlong", "drop or truncate"),
        "dataset_exact_deduplication": ("data.curate: [deduplicate]", "of equal rows one stays"),
        "min_sample_len": (
            "data.curate: [{kind: filter, min_tokens: N}]",
            "fewest tokens of a row",
        ),
        "chat_template": ("data.chat_template", "chatml, or a Jinja text; else the model's own"),
        "chat_template_jinja": ("data.chat_template", "a Jinja text"),
        "default_system_message": ("data.train.0.system", "for conversations without one"),
        "tokens": ("model.add_tokens", "tokens that get a row of their own"),
        "added_tokens_overrides": ("model.add_tokens", "tokens that get a row of their own"),
        "special_tokens": (
            "model.add_tokens",
            "finray takes the tokenizer's, without padding; an answer ends as the template writes",
        ),
        "eot_tokens": ("data.chat_template", "what ends a turn is the template's matter"),
        "train_on_inputs": ("method.train_on: all", "the loss covers prompts too"),
        "rl": ("method.kind", "dpo, ipo, kto, orpo, simpo or grpo"),
        "rl_beta": ("method.beta", "distance from the reference"),
        "dpo_beta": ("method.beta", "distance from the reference"),
        "orpo_alpha": ("method.beta", "weight of the odds ratio"),
        "simpo_gamma": ("method.gamma", "margin between the answers"),
        "cpo_alpha": ("method.sft_weight", "weight of the chosen answer's cross-entropy"),
        "rpo_alpha": ("method.losses: {sigmoid: 1, sft: X}", "the chosen answer's cross-entropy"),
        "dpo_label_smoothing": ("method.label_smoothing", "share of wrongly labelled pairs"),
        "dpo_loss_type": ("method.losses", "losses and their weights"),
        "dpo_loss_weights": ("method.losses", "losses and their weights"),
        "trl": ("method", "generations, max_completion, rewards, beta, rollout and so on"),
        "reward_model": ("method.kind: reward", "a reward model from pairs"),
        "center_rewards_coefficient": ("method.center_coefficient", "keeps scores around zero"),
        "micro_batch_size": ("optim.micro_batch_size", "sequences in a forward pass"),
        "batch_size": ("optim.batch_size", "sequences in a step over all GPUs"),
        "num_epochs": ("optim.epochs", "passes over the data"),
        "optimizer": ("optim", "the optimizer is AdamW with states of 32 bits"),
        "lr_scheduler": ("optim.schedule", "constant, linear or cosine"),
        "eager_attention": ("model.attention: eager", "attention with a mask"),
        "attn_implementation": ("model.attention", "auto computes documents one at a time"),
        "bfloat16": ("model.dtype: bfloat16", "compute type"),
        "float16": ("model.dtype: float16", "compute type"),
        "float32": ("model.dtype: float32", "compute type"),
        "torch_dtype": ("model.dtype", "compute type"),
        "fsdp_config": ("scale.strategy: fsdp", "FSDP2, whose details finray chooses"),
        "ray_num_workers": ("scale.workers", "a worker trains on one GPU"),
        "evals_per_epoch": ("eval.every_steps", "finray counts steps, not parts of an epoch"),
        "saves_per_epoch": ("checkpoint.every_steps", "finray counts steps, not parts of an epoch"),
        "use_tensorboard": ("log.to", "TensorBoard"),
        "wandb_project": ("log.to: [wandb]", "WANDB_PROJECT in the environment is the project"),
        "use_wandb": ("log.to: [wandb]", "Weights & Biases"),
        "use_mlflow": ("log.to: [mlflow]", "MLflow"),
        "use_trackio": ("log.to: [trackio]", "Trackio"),
        "early_stopping_patience": ("eval.patience", "measurements without a better value"),
        "wandb_name": ("name", "the run's name"),
        "reinit_weights": ("method.init: random", "start from random weights"),
        "streaming": STREAMING,
    },
    {
        **{
            names: text
            for names, text in LEFT.items()
            if not {"lr_scheduler_kwargs", "ray_scope"} & set(names.split())
        },
        "lr_scheduler_kwargs cosine_min_lr_ratio cosine_constant_lr_ratio lr_quadratic_warmup "
        "lr_div_factor eta_min log_sweep jagged_restart_steps jagged_restart_warmup_steps "
        "jagged_restart_anneal_steps": "details of a schedule; finray's end at zero",
        "wandb_entity wandb_watch wandb_run_id wandb_log_model wandb_mode "
        "mlflow_tracking_uri mlflow_experiment_name mlflow_run_name "
        "hf_mlflow_log_artifacts use_comet comet_api_key comet_workspace comet_project_name "
        "comet_experiment_key comet_mode comet_online comet_experiment_config "
        "trackio_project_name trackio_run_name gradio_title gradio_share gradio_server_name "
        "gradio_server_port gradio_max_new_tokens gradio_temperature use_otel_metrics "
        "otel_metrics_host otel_metrics_port use_swanlab swanlab_project swanlab_experiment_name "
        "swanlab_description swanlab_mode swanlab_workspace swanlab_api_key swanlab_log_model "
        "swanlab_web_host swanlab_api_host swanlab_lark_webhook_url swanlab_lark_secret "
        "swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer": (
            "a service's settings, which its environment variables hold (WANDB_ENTITY, "
            "MLFLOW_TRACKING_URI); log.to says where metrics go"
        ),
        "model_type tokenizer_type tokenizer_config tokenizer_use_fast tokenizer_legacy "
        "tokenizer_use_mistral_common tokenizer_save_jinja_files is_falcon_derived_model "
        "is_llama_derived_model is_mistral_derived_model is_qwen_derived_model base_model_config "
        "type_of_model model_config "
        "base_model_ignore_patterns processor_type processor_config cls_model_config "
        "processor_kwargs": (
            "the classes that load model and tokenizer; finray takes those of config.json"
        ),
        "overrides_of_model_config overrides_of_model_kwargs model_kwargs device device_map "
        "max_memory gpu_memory_limit low_cpu_mem_usage experimental_skip_move_to_device "
        "lora_on_cpu": "how weights are loaded and placed; finray reads them where they train",
        "image_size image_resize_algorithm skip_prepare_dataset freeze_mm_modules "
        "role_boundaries": (
            "images and sounds; finray trains text alone, and refuses rows that hold any"
        ),
        "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings "
        "embeddings_skip_upcast fix_untrained_tokens": (
            "sizes of the embedding; finray adds rows for new tokens, at the mean of the others"
        ),
        "lora_fan_in_fan_out peft_autocast_adapter_dtype peft_ensure_weight_tying "
        "lora_modules_to_save_dtype qlora_sharded_model_loading": (
            "details of PEFT, which follow from the model"
        ),
        "peft_layers_to_transform peft_layers_pattern": (
            "an adapter on some layers only; write adapter.targets as a regular expression"
        ),
        "peft_trainable_token_indices": (
            "single rows of the embedding; model.add_tokens names tokens to train"
        ),
        "loraplus_lr_embedding embedding_lr embedding_lr_scale lr_groups": (
            "rates of their own for parts of the model; finray has optim.lora_plus_ratio"
        ),
        "lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel unsloth_lora_mlp "
        "unsloth_lora_qkv unsloth_lora_o unsloth_cross_entropy_loss unsloth_rms_norm unsloth_rope "
        "liger_rope liger_rms_norm liger_rms_norm_gated liger_glu_activation liger_layer_norm "
        "liger_swiglu liger_cross_entropy liger_fused_linear_cross_entropy "
        "liger_use_token_scaling cut_cross_entropy flash_attn_cross_entropy flash_attn_rms_norm "
        "flash_attn_fuse_qkv flash_attn_fuse_mlp flash_optimum chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks use_kernels experts_implementation use_scattermoe "
        "use_sonicmoe tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp "
        "llama4_linearized_experts gc_steps profiler_steps profiler_steps_start plugins "
        "kernelize_model use_onebitllms quantize_moe_experts dpo_use_liger_kernel "
        "lora_fp32_gradients nf4_backend fused_attn_kernel gc_collect_steps "
        "selective_checkpointing layer_offloading deepcompile fp32_norms fp32_norm_classes "
        "torch_compile_regional torch_compile_options sync_profiler_steps sync_profiler_start_step "
        "include_tkps ple_cpu_offload cut_cross_entropy_accum_c_fp32 "
        "cut_cross_entropy_c_grad_chunk_size liger_kernel_impl nonexpert_quantization "
        "moe_grouped_backend moe_dequant_chunk_size moe_bnb_fast autotune_cache_path "
        "autotune_profiles autotune_neighborhood use_dsv4_kernels use_glm_dsa_kernels "
        "dsv4_fp8_nonexpert_mode dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel dsv4_bf16_all "
        "dsv4_fp4_grouped_mode gemma4_fp8_nonexpert gemma4_nf4_nonexpert": (
            "kernels and plugins: speed and memory, not the result; finray has its own"
        ),
        "dense_mixer": "the router's gradient through all experts; finray leaves routers as they "
        "are",
        "spectrum_top_fraction spectrum_model_name": (
            "training of the layers with the highest signal; freeze.train names layers"
        ),
        "grokfast_alpha grokfast_lamb": "a filter of the gradients, which finray does not have",
        "use_mora mora_type mora mixlora_num_experts mixlora_top_k mixlora_router_aux_loss_coef "
        "mixlora_router_init_range mixlora_jitter_noise mixlora_expert_lora_r "
        "mixlora_expert_lora_alpha mixlora_expert_lora_dropout peft_layer_replication": (
            "another kind of adapter; finray has LoRA"
        ),
        "merge_lora merge_method export save_compressed": (
            "what becomes of the result; finray export merges and converts it"
        ),
        "llmcompressor": "sparse or compressed weights, which finray does not train",
        "hatchery coreweave": "training on a service",
        "nemo_gym_enabled nemo_gym_dir nemo_gym_auto_clone nemo_gym_config_paths "
        "nemo_gym_head_port nemo_gym_server_timeout nemo_gym_verify_timeout nemo_gym_run_timeout "
        "nemo_gym_datasets nemo_gym_auto_start nemo_gym_model_name nemo_gym_multi_turn "
        "nemo_gym_max_turns": "rewards from NeMo Gym's environments; finray has functions",
        "trainer_cls": "your own trainer",
        "dynamic_checkpoint": "saving on a signal; finray saves when it is stopped (Ctrl-C)",
        "balance_labels label_balance_window_optim_steps": (
            "the order of the rows by their labels; finray shuffles them by its seed"
        ),
        "chat_template_kwargs": (
            "variables of the chat template; data.chat_template takes a template with them set"
        ),
        "process_reward_model": "a reward model of single steps, which finray does not have",
        "capabilities env_capabilities": "what the machine has",
        "flash_attention sdp_attention xformers_attention flex_attention s2_attention "
        "sage_attention flex_attn_compile_kwargs heads_k_stride ring_attn_func "
        "gemma4_hybrid_attn_impl large_head_attention flash_attn_d512 sdpa_varlen "
        "fa_varlen_kwargs_in_collator scaling_softmax_bias "
        "batch_flattening scaling_softmax scaling_softmax_factor": (
            "the attention kernel; model.attention: auto computes packed documents one at a time"
        ),
        "sequence_parallel_degree context_parallel_size tensor_parallel_size dp_shard_size "
        "dp_replicate_size expert_parallel_size fsdp_version fsdp_final_state_dict_type "
        "ddp use_ray ray_run_name resources_per_worker context_parallel expert_parallel_backend "
        "expert_parallel_num_nvl_bytes expert_parallel_num_rdma_bytes "
        "expert_parallel_token_capacity expert_parallel_fallback_on_unsupported "
        "expert_parallel_save_dispatch expert_parallel_dispatch_chunks": (
            "how the model is spread over GPUs; finray has scale.workers and scale.strategy"
        ),
        "pad_to_sequence_len eval_sample_packing sample_packing_group_size "
        "sample_packing_bin_size sample_packing_sequentially sample_packing_mp_start_method "
        "sample_packing_eff_est sample_packing_seq_len_multiplier max_packed_sequence_len "
        "pretrain_multipack_buffer_size pretrain_multipack_attn pretraining_sample_concatenation "
        "multipack_real_batches curriculum_sampling total_num_tokens total_supervised_tokens "
        "max_prompt_len pad_to_multiple_of": (
            "details of packing and padding; finray packs as full as it can"
        ),
        "dataset_prepared_path dataset_processes dataset_keep_in_memory dataset_shard_num "
        "dataset_shard_idx push_dataset_to_hub hf_use_auth_token "
        "shuffle_merged_datasets shuffle_before_merging_datasets "
        "streaming_multipack_buffer_size preprocess_iterable is_preprocess skip_prepare "
        "num_dataset_shards_to_save save_first_step": (
            "where prepared data is kept; finray keeps it in the storage, and prepares it again "
            "when something of it changes"
        ),
        "eval_batch_size eval_sequence_len": (
            "how an evaluation is computed; finray measures in batches of its own size"
        ),
        "eval_table_size eval_max_new_tokens eval_causal_lm_metrics lm_eval_tasks "
        "lm_eval_batch_size lm_eval_post_train lm_eval_model num_generation_samples "
        "generation_max_new_tokens generation_temperature generation_top_p generation_top_k "
        "generation_prompt_ratio generation_do_sample dpo_generate_during_eval "
        "do_causal_lm_eval do_bench_eval bench_dataset bench_split bench_source_max_len": (
            "further evaluations; eval.samples shows answers to held-out prompts"
        ),
        "loss_watchdog_threshold loss_watchdog_patience": (
            "ending when the loss is high; finray goes back after steps whose loss is not finite"
        ),
        "auto_resume_from_checkpoints": "the same command continues a run",
        "adam_eps adam_beta3 adam_epsilon2 optimizer_cls_and_kwargs torchdistx_path dion_lr "
        "dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank "
        "qgalore_update_proj_gap qgalore_scale qgalore_proj_type qgalore_proj_quant "
        "qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj "
        "qgalore_queue_size": ("details of other optimizers; finray has AdamW"),
        "relora relora_steps relora_prune_ratio relora_cpu_offload relora_warmup_steps "
        "relora_anneal_steps relora_prune_method jagged_restarts": (
            "ReLoRA, which merges the adapter again and again; finray trains one adapter"
        ),
        "lisa_n_layers lisa_step_interval lisa_layers_attr lisa_layers_attribute": (
            "LISA, training of changing layers, which finray does not have"
        ),
        "use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks rope_scaling": (
            "a longer context than the model's; finray leaves the model's positions as they are"
        ),
        "gptq gptq_groupsize gptq_model_v1 gptq_disable_exllama bnb_config_kwargs "
        "model_quantization_config model_quantization_config_kwargs": (
            "weights that are quantised already; finray quantises a base in 16 bits (nf4, int8)"
        ),
        "qat quantization fp8 fp8_config fp8_enable_fsdp_float8_all_gather nvfp4_merge_aware "
        "nvfp4_merge_aware_start_step": (
            "training for or in low precision; finray computes in 16 or 32 bits"
        ),
        "use_dynamic_finetuning use_dft use_eaft eaft_alpha eaft_k ebft": (
            "another loss; finray has the cross-entropy of the next token"
        ),
        "diffusion diffusion_lm diffusion_decision noise_schedule min_mask_ratio max_mask_ratio "
        "num_diffusion_steps eps importance_weighting mask_token_id "
        "mask_token_str generate_samples generation_interval generation_steps "
        "generation_max_length": (
            "a diffusion model; finray trains those that predict the next token"
        ),
        "kd_trainer kd_ce_alpha kd_alpha kd_temperature kd_zscore_base_temp kd_top_k_before_softmax"
        " kd_online_server kd_online_server_base_url kd_beta kd_normalize_topk kd_online_topk "
        "kd_online_timeout kd_temperature_min": (
            "distillation from a teacher, which finray does not have"
        ),
        "dpo_use_weighting dpo_use_logits_to_keep dpo_norm_loss dpo_padding_free dpo_ld_alpha": (
            "details of TRL's DPO trainer"
        ),
        "vllm": "vLLM's server; with method.rollout: vllm finray starts it itself",
        "num_labels": "classes of a classifier; finray trains reward models with one score",
        "strict axolotl_config_path": "how strictly the file is read",
        "expert_backend torch_compile_dynamic gradient_checkpointing_offload": (
            "how the device computes; finray chooses"
        ),
    },
    frozenset(
        "base_model base_model_config sequence_len micro_batch_size num_epochs sample_packing "
        "val_set_size lora_target_linear rl lora_modules_to_save_dtype pretraining_dataset "
        "test_datasets dataset_prepared_path special_tokens evals_per_epoch saves_per_epoch "
        "train_on_inputs eval_sample_packing lora_model_dir "
        "unfrozen_parameters flash_attention".split()
    ),
)
