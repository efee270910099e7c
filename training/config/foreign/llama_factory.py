"""LLaMA-Factory's settings."""

from .dialect import Dialect
from .transformers import COMBINED, COPIED, LEFT, STREAMING

LLAMA_FACTORY = Dialect(
    "LLaMA-Factory",
    {
        **COPIED,
        "cutoff_len": "data.max_length",
        "lora_rank": "adapter.rank",
        "lora_dropout": "adapter.dropout",
        "use_dora": "adapter.dora",
        "use_rslora": "adapter.rslora",
        "loraplus_lr_ratio": "optim.lora_plus_ratio",
    },
    {
        **COMBINED,
        "model_name_or_path": ("model.base", "hub id or folder"),
        "model_revision": ("model.revision", "a commit, tag or branch"),
        "adapter_name_or_path": ("model.adapter", "an adapter to train on"),
        "stage": ("method.kind", "pt is pretrain, sft, rm is reward, dpo, kto"),
        "finetuning_type": ("adapter", "lora; full has no adapter, freeze has the section freeze"),
        "lora_alpha": ("adapter.alpha", "2 x lora_rank where it is left out"),
        "lora_target": ("adapter.targets", "all is all-linear"),
        "additional_target": ("adapter.modules_to_save", "modules that are trained whole"),
        "pissa_init": ("adapter.init: pissa", "principal components as first values"),
        "freeze_trainable_layers": ("freeze.last_layers", "number of last layers"),
        "freeze_trainable_modules": ("freeze.last_layers", "finray trains whole layers"),
        "freeze_extra_modules": ("freeze.train", "names of further weights"),
        "quantization_bit": ("model.quantize", "4 is nf4, 8 is int8"),
        "dataset": ("data.train", "names in dataset_info.json, or a list of sources"),
        "eval_dataset": ("data.eval", "names in dataset_info.json"),
        "dataset_dir": ("data.train.0.dataset_info", "the folder of dataset_info.json"),
        "template": ("data.chat_template", "the model's own template, unless it is set"),
        "default_system": ("data.train.0.system", "for conversations without one"),
        "train_on_prompt": ("method.train_on: all", "the loss covers prompts too"),
        "mask_history": ("method.train_on: last", "only the last answer is trained"),
        "max_samples": ("data.train.0.limit", "first rows of each source"),
        "val_size": ("data.holdout", "share of the rows that is held out"),
        "packing": ("data.packing", "finray keeps the documents of a sequence apart"),
        "neat_packing": ("data.packing", "several documents in a sequence, kept apart"),
        "enable_thinking": (
            "method.train_on_reasoning",
            "whether reasoning is rendered; the rows decide it here",
        ),
        "resize_vocab": ("model.add_tokens", "rows for new tokens come with them"),
        "add_tokens": ("model.add_tokens", "tokens that get a row of their own"),
        "add_special_tokens": ("model.add_tokens", "tokens that get a row of their own"),
        "new_special_tokens": ("model.add_tokens", "tokens that get a row of their own"),
        "new_special_tokens_config": ("model.add_tokens", "a file that lists them"),
        "flash_attn": ("model.attention", "auto computes documents one at a time"),
        "pure_bf16": ("model.dtype: bfloat16", "compute type"),
        "disable_gradient_checkpointing": (
            "model.gradient_checkpointing: false",
            "LLaMA-Factory recomputes activations unless told otherwise",
        ),
        "train_from_scratch": ("method.init: random", "with method: pretrain"),
        "pref_loss": ("method.kind", "orpo and simpo are methods, the others losses of dpo"),
        "pref_beta": ("method.beta", "distance from the reference"),
        "dpo_beta": ("method.beta", "the older name of pref_beta"),
        "orpo_beta": ("method.beta", "the older name of pref_beta"),
        "kto_beta": ("method.beta", "the older name of pref_beta"),
        "pref_ftx": ("method.losses: {sigmoid: 1, sft: X}", "the chosen answer's cross-entropy"),
        "dpo_ftx": ("method.losses: {sigmoid: 1, sft: X}", "the older name of pref_ftx"),
        "kto_ftx": ("method.losses", "the older name of pref_ftx"),
        "dpo_loss": ("method.kind", "the older name of pref_loss"),
        "dpo_label_smoothing": ("method.label_smoothing", "share of wrongly labelled pairs"),
        "kto_chosen_weight": ("method.desirable_weight", "weight of good answers"),
        "kto_rejected_weight": ("method.undesirable_weight", "weight of bad answers"),
        "simpo_gamma": ("method.gamma", "margin between the answers"),
        "ref_model": ("method.reference_model", "the reference of dpo and kto"),
        "ray_num_workers": ("scale.workers", "a worker trains on one GPU"),
        "early_stopping_steps": ("eval.patience", "measurements without a better value"),
        "ray_run_name": ("name", "the run's name"),
        "streaming": STREAMING,
    },
    {
        **{names: text for names, text in LEFT.items() if "ray_scope" not in names},
        "plot_loss": "a plot of the loss; the report has it",
        "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches "
        "video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video "
        "audio_sampling_rate freeze_vision_tower freeze_multi_modal_projector "
        "freeze_language_model train_mm_proj_only visual_inputs image_resolution "
        "video_resolution": "images, videos and sounds; finray trains text alone",
        "overwrite_cache tokenized_path buffer_size cache_dir data_shared_file_system "
        "ignore_pad_token_for_loss reserved_label_len": (
            "where prepared data is kept; finray keeps it in the storage, and prepares it again "
            "when something of it changes"
        ),
        "mix_strategy interleave_probs": (
            "drawing from several data sets by probabilities; the sources' weight, or data.mix"
        ),
        "tool_format": "how tools are rendered; the chat template does that",
        "eval_num_beams eval_on_each_dataset predict_with_generate compute_accuracy "
        "disable_shuffling": (
            "further evaluations; eval.samples shows answers to held-out prompts"
        ),
        "efficient_eos replace_jinja_template replace_text split_special_tokens "
        "use_fast_tokenizer": "details of the tokenizer, which finray takes as it is",
        "init_special_tokens freeze_original_embeddings": (
            "first values of new tokens, and the rows of the others; finray's start at the mean of "
            "these, and the embedding is trained whole"
        ),
        "rope_scaling shift_attn mixture_of_depths": (
            "a changed model; finray trains the architecture as its config.json has it"
        ),
        "low_cpu_mem_usage offload_folder use_kv_cache use_unsloth use_unsloth_gc use_kt "
        "kt_optimize_rule kt_mode kt_maxlen kt_use_cuda_graph cpu_infer chunk_size mode "
        "enable_liger_kernel use_v1_kernels enable_quantization upcast_layernorm "
        "upcast_lmhead_output print_param_status fp8 fp8_backend "
        "fp8_enable_fsdp_float8_all_gather include_mfu use_megatron use_hyper_parallel "
        "use_mca hyper_parallel_args include_effective_tokens_per_second block_diag_attn "
        "kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
        "kt_lora_expert_intermediate_size bias_activation_fusion apply_rope_fusion "
        "use_distributed_optimizer overlap_param_gather overlap_grad_reduce moe_grouped_gemm "
        "moe_token_dispatcher_type recompute_granularity recompute_method recompute_num_layers": (
            "how the model computes: kernels and memory; finray has its own"
        ),
        "moe_aux_loss_coef": "the router's balance; finray leaves routers as they are",
        "quantization_method quantization_type double_quantization quantization_device_map": (
            "the quantiser; finray has bitsandbytes' NF4 with double quantisation, and LLM.int8()"
        ),
        "infer_backend infer_dtype vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank "
        "vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config "
        "sglang_lora_backend do_sample temperature top_p top_k num_beams max_length "
        "max_new_tokens repetition_penalty length_penalty skip_special_tokens": (
            "how answers are generated after the training"
        ),
        "export_dir export_size export_device export_quantization_bit export_quantization_dataset "
        "export_quantization_nsamples export_quantization_maxlen export_legacy_format "
        "export_hub_model_id": "exporting a model: finray export",
        "hf_hub_token ms_hub_token om_hub_token": (
            "a secret, which belongs in the environment: HF_TOKEN"
        ),
        "adapter_folder create_new_adapter": (
            "merging adapters before the training; finray export --merge makes a base of one"
        ),
        "pissa_iter pissa_convert": "finray computes PiSSA exactly, and writes an ordinary adapter",
        "loraplus_lr_embedding": "a rate of its own for embeddings; finray has none",
        "freeze_trainable use_llama_pro": (
            "LLaMA-Pro's added layers; finray trains the last layers (freeze.last_layers)"
        ),
        "oft_rank oft_block_size oft_target module_dropout": "OFT, which finray does not have",
        "pref_bco_weight ld_alpha ref_model_adapters ref_model_quantization_bit": (
            "details of its DPO trainer"
        ),
        "ppo_buffer_size ppo_epochs ppo_score_norm ppo_target ppo_whiten_rewards reward_model "
        "reward_model_adapters reward_model_quantization_bit reward_model_type": (
            "PPO, which finray does not have"
        ),
        "use_galore galore_target galore_rank galore_update_interval galore_scale "
        "galore_proj_type galore_layerwise use_apollo apollo_target apollo_rank "
        "apollo_update_interval apollo_scale apollo_proj apollo_proj_type apollo_scale_type "
        "apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block "
        "badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose "
        "use_adam_mini use_muon use_adaclip": "another optimizer; finray has AdamW",
        "tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size "
        "context_parallel_size virtual_pipeline_model_parallel_size sequence_parallel": (
            "how the model is spread over GPUs; finray has scale.workers and scale.strategy"
        ),
        "use_dft_loss use_eaft_loss use_asft_loss dft_alpha asft_alpha eaft_alpha": (
            "another loss; finray has the cross-entropy of the next token"
        ),
        "use_swanlab swanlab_project swanlab_workspace swanlab_run_name swanlab_mode "
        "swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret "
        "trackio_project": (
            "another service's settings; log.to says what is written beside metrics.jsonl"
        ),
        "task task_dir batch_size lang n_shot save_dir download_mode": "measuring a finished model",
        "preserve_thinking": "whether earlier reasoning is rendered; the chat template decides",
        "compute_dtype device_map model_max_length": "follows from other settings",
        "ray_storage_path ray_storage_filesystem ray_init_kwargs resources_per_worker "
        "placement_strategy master_addr master_port": (
            "Ray's cluster: finray train --address, or finray job submit"
        ),
        "profiler_args enable_profiler enable_torch_profiler profiler_output_dir "
        "profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat "
        "profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules": (
            "profiling"
        ),
    },
    frozenset(
        "stage finetuning_type cutoff_len template lora_rank lora_target dataset dataset_dir "
        "quantization_bit val_size max_samples plot_loss overwrite_cache neat_packing pref_loss "
        "pref_beta flash_attn adapter_name_or_path infer_backend export_dir eval_dataset "
        "mask_history train_on_prompt additional_target freeze_trainable_layers".split()
    ),
)
