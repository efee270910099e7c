"""Configurations of Axolotl, LLaMA-Factory and TRL in the shapes that people have."""

_AXOLOTL_TAIL = """
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
wandb_project:
wandb_entity:
"""
_QLORA = """
adapter: qlora
load_in_4bit: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
"""
_LORA = """
adapter: lora
load_in_8bit: true
lora_model_dir:
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj, up_proj, q_proj, v_proj, k_proj, o_proj]
"""


def _axolotl(own: str, tail: str = _AXOLOTL_TAIL) -> str:
    return f"base_model: org/model\nmodel_type: AutoModelForCausalLM\n{own}{tail}"


_ALPACA = "datasets:\n  - path: org/alpaca\n    type: alpaca\nsequence_len: 2048\n"
_PACKED = "sample_packing: true\neval_sample_packing: true\npad_to_sequence_len: true\n"

AXOLOTL: dict[str, str] = {
    "lora": _axolotl(f"{_ALPACA}val_set_size: 0.05\noutput_dir: ./outputs/lora-out\n{_LORA}"),
    "qlora": _axolotl(f"{_ALPACA}{_PACKED}val_set_size: 0.1\noutput_dir: ./qlora\n{_QLORA}"),
    "full": _axolotl(
        f"{_ALPACA}{_PACKED}val_set_size: 0\noutput_dir: ./out\nadapter:\n"
        "deepspeed: deepspeed_configs/zero3_bf16.json\n"
    ),
    "full-fsdp": _axolotl(
        f"{_ALPACA}{_PACKED}fsdp: [full_shard, auto_wrap]\nfsdp_config:\n"
        "  fsdp_offload_params: false\n  fsdp_state_dict_type: FULL_STATE_DICT\n"
    ),
    "fsdp2": _axolotl(f"{_ALPACA}fsdp_version: 2\nfsdp_config: {{reshard_after_forward: true}}\n"),
    "chat-template": _axolotl(
        "chat_template: llama3\ndatasets:\n  - path: org/chats\n    type: chat_template\n"
        "    field_messages: conversations\n    message_property_mappings: {role: from, "
        "content: value}\n    roles:\n      user: [human]\n      assistant: [gpt]\n"
        f"    roles_to_train: [assistant]\n    train_on_eos: turn\nsequence_len: 4096\n{_QLORA}"
    ),
    "field-map": _axolotl(
        "datasets:\n  - path: data/chats.jsonl\n    ds_type: json\n    type: chat_template\n"
        "    field_messages: dialog\n    message_field_role: speaker\n"
        f"    message_field_content: text\nsequence_len: 1024\n{_LORA}"
    ),
    "chatml": _axolotl(
        "chat_template: chatml\ndatasets:\n  - path: org/chats\n    type: sharegpt\n"
        '    conversation: chatml\nspecial_tokens:\n  eos_token: "<|im_end|>"\n'
        f'  pad_token: "</s>"\ntokens:\n  - "<|im_start|>"\nsequence_len: 2048\n{_QLORA}'
        "lora_modules_to_save: [embed_tokens, lm_head]\n"
    ),
    "multi": _axolotl(
        "datasets:\n  - path: org/a\n    name: en\n    split: train[:10%]\n    type: alpaca\n"
        "  - path: org/b\n    type: sharegpt\n    shards: 10\n  - path: org/c\n    data_files:\n"
        f"      - part-1.jsonl\n      - part-2.jsonl\n    type: oasst\nsequence_len: 2048\n{_LORA}"
    ),
    "completion": _axolotl(
        "datasets:\n  - path: org/texts\n    type: completion\n    field: body\n"
        f"sequence_len: 4096\n{_PACKED}{_QLORA}"
    ),
    "pretrain": _axolotl(
        "max_steps: 200\npretraining_dataset:\n  - path: org/c4\n    name: en\n    type: pretrain\n"
        "sequence_len: 2048\nsample_packing: true\n"
    ),
    "dpo": _axolotl(
        "rl: dpo\nrl_beta: 0.1\nchat_template: llama3\ndatasets:\n  - path: org/pairs\n"
        "    type: chat_template.default\n    field_messages: conversation\n"
        "    field_chosen: chosen\n    field_rejected: rejected\n    roles: {system: [system]}\n"
        f"val_set_size: 0.05\nsequence_len: 4096\nsample_packing: false\n{_LORA}"
    ),
    "dpo-intel": _axolotl(
        "rl: dpo\ndatasets:\n  - path: org/pairs\n    split: train\n    type: chatml.intel\n"
        f"  - path: org/more\n    type: chatml.argilla\nsequence_len: 1024\n{_QLORA}"
    ),
    "ipo": _axolotl(f"rl: ipo\ndatasets: [{{path: org/pairs, type: chatml.icr}}]\n{_LORA}"),
    "dpo-own": _axolotl(
        "rl: dpo\ndatasets:\n  - path: org/pairs\n    type:\n      field_prompt: question\n"
        "      field_system: system\n      field_chosen: good\n      field_rejected: bad\n"
        f'      prompt_format: "{{prompt}}"\nsequence_len: 1024\n{_LORA}'
    ),
    "kto": _axolotl(
        "rl: kto\nrl_beta: 0.5\nkto_desirable_weight: 0.2\nremove_unused_columns: false\n"
        "datasets:\n  - path: org/labelled\n    type: llama3.ultra\n    split: train\n"
        f"sequence_len: 2048\n{_QLORA}"
    ),
    "orpo": _axolotl(
        "rl: orpo\norpo_alpha: 0.1\nchat_template: chatml\ndatasets:\n  - path: org/pairs\n"
        f"    type: chat_template.argilla\nsequence_len: 2048\n{_QLORA}"
    ),
    "simpo": _axolotl(
        "rl: simpo\nrl_beta: 2.5\nsimpo_gamma: 1.0\ndatasets: [{path: org/p, type: chatml.ultra}]\n"
        f"sequence_len: 1024\n{_LORA}"
    ),
    "reward": _axolotl(
        "reward_model: true\nnum_labels: 1\ncenter_rewards_coefficient: 0.01\n"
        "chat_template: gemma\ndatasets:\n  - path: org/pairs\n"
        "    type: bradley_terry.chat_template\nsequence_len: 2048\n"
    ),
    "grpo": _axolotl(
        "rl: grpo\ntrl:\n  beta: 0.001\n  max_completion_length: 128\n  num_generations: 4\n"
        "  use_vllm: false\n  reward_funcs: [rewards.is_short]\n  reward_weights: [2.0]\n"
        "datasets:\n  - path: org/questions\n    name: main\n    type: rewards.transform\n"
        f"sequence_len: 512\nmax_steps: 50\n{_LORA}",
        _AXOLOTL_TAIL.replace("num_epochs: 3", "num_epochs: 1").replace("bf16: auto", "bf16: true"),
    ),
    "text-rates": _axolotl(
        f"{_ALPACA}{_QLORA}",
        "micro_batch_size: 1\ngradient_accumulation_steps: 8\nnum_epochs: 4\n"
        'learning_rate: "2e-4"\n'
        "lr_scheduler: constant_with_warmup\nwarmup_steps: 20\noptimizer: paged_adamw_32bit\n"
        "weight_decay: 1e-2\nadam_beta2: 0.95\nadam_eps: 1e-8\nmax_grad_norm: 1.0\n",
    ),
    "own-format": _axolotl(
        "datasets:\n  - path: org/rows\n    type:\n      system_prompt: You help.\n"
        "      field_instruction: ask\n      field_output: reply\n"
        '      format: "[INST] {instruction} [/INST] "\n'
        f'      no_input_format: "[INST] {{instruction}} [/INST] "\nsequence_len: 1024\n{_LORA}'
    ),
    "dora": _axolotl(
        f"{_ALPACA}adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_dropout: 0\npeft_use_dora: true\n"
        "peft_use_rslora: true\nlora_target_linear: true\nloraplus_lr_ratio: 16\n"
    ),
    "unfrozen": _axolotl(
        f"{_ALPACA}unfrozen_parameters:\n  - ^lm_head.weight$\n  - model.layers.1\n"
        "  - model.embed_tokens.weight$[:32000]\n"
    ),
    "kernels": _axolotl(
        f"{_ALPACA}{_PACKED}{_QLORA}plugins: [axolotl.integrations.liger.LigerPlugin]\n"
        "liger_rope: true\nliger_rms_norm: true\nliger_fused_linear_cross_entropy: true\n"
        "lora_mlp_kernel: true\nlora_qkv_kernel: true\nlora_o_kernel: true\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\n"
    ),
    "test-datasets": _axolotl(
        "datasets: [{path: org/a, type: alpaca_chat.load_qa}]\n"
        "test_datasets: [{path: org/a, split: test, type: alpaca_chat.load_qa}]\n"
        f"eval_sample_packing: false\nsequence_len: 1024\n{_QLORA}"
    ),
    "jinja": _axolotl(
        'chat_template: jinja\nchat_template_jinja: "{% for message in messages %}'
        "{{ message.role + ': ' + message.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}\"\n"
        f"datasets: [{{path: org/chats, type: chat_template}}]\nsequence_len: 1024\n{_LORA}"
    ),
    "ray": _axolotl(
        f"{_ALPACA}{_PACKED}{_LORA}use_ray: true\nray_num_workers: 4\nsave_first_step: true\n"
    ),
    "sparse-keys": _axolotl(
        f"{_ALPACA}strict: false\npush_dataset_to_hub:\nhf_use_auth_token: true\n"
        "trust_remote_code: true\ntokenizer_use_fast: true\nlora_r:\nlora_alpha:\ngptq_groupsize:\n"
        "special_tokens:\ndebug:\ndeepspeed:\nfsdp:\nfsdp_config:\nxformers_attention:\n"
        "early_stopping_patience:\nlocal_rank:\ngroup_by_length: false\ntrain_on_inputs: true\n"
    ),
}

_FACTORY_OUTPUT = """
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
"""
_FACTORY_TRAIN = """
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""
_FACTORY_EVAL = """
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""
_FACTORY_DATA = """
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
"""


def _factory(
    own: str, data: str = _FACTORY_DATA, train: str = _FACTORY_TRAIN + _FACTORY_EVAL
) -> str:
    head = "model_name_or_path: org/model\ntrust_remote_code: true\ndo_train: true\n"
    return f"{head}{own}\n{data}{_FACTORY_OUTPUT}{train}"


_FACTORY_LORA = "finetuning_type: lora\nlora_rank: 8\nlora_target: all\n"
_PAIRS = _FACTORY_DATA.replace("identity,alpaca_en_demo", "dpo_en_demo")

LLAMA_FACTORY: dict[str, str] = {
    "lora-sft": _factory(f"stage: sft\n{_FACTORY_LORA}"),
    "lora-dpo": _factory(
        f"stage: dpo\n{_FACTORY_LORA}pref_beta: 0.1\npref_loss: sigmoid\n", _PAIRS
    ),
    "lora-orpo": _factory(f"stage: dpo\n{_FACTORY_LORA}pref_beta: 0.1\npref_loss: orpo\n", _PAIRS),
    "lora-simpo": _factory(
        f"stage: dpo\n{_FACTORY_LORA}pref_loss: simpo\nsimpo_gamma: 0.5\n", _PAIRS
    ),
    "lora-ipo": _factory(f"stage: dpo\n{_FACTORY_LORA}pref_loss: ipo\npref_ftx: 0.2\n", _PAIRS),
    "lora-kto": _factory(
        f"stage: kto\n{_FACTORY_LORA}pref_beta: 0.1\nkto_chosen_weight: 1.5\n",
        _FACTORY_DATA.replace("identity,alpaca_en_demo", "kto_en_demo"),
    ),
    "lora-reward": _factory(f"stage: rm\n{_FACTORY_LORA}", _PAIRS),
    "lora-pretrain": _factory(
        f"stage: pt\n{_FACTORY_LORA}", "dataset: c4_demo\ncutoff_len: 2048\nmax_samples: 1000\n"
    ),
    "lora-ray": _factory(
        f"stage: sft\n{_FACTORY_LORA}",
        _FACTORY_DATA + "dataset_dir: REMOTE:org/demo_data\n",
        _FACTORY_TRAIN + "ray_run_name: sft\nray_storage_path: ./saves\nray_num_workers: 4\n"
        "placement_strategy: PACK\nresources_per_worker: {GPU: 1}\n",
    ),
    "lora-ds3": _factory(
        f"stage: sft\n{_FACTORY_LORA}deepspeed: examples/deepspeed/ds_z3_config.json\n"
    ),
    "full-sft": _factory(
        "stage: sft\nfinetuning_type: full\ndeepspeed: examples/deepspeed/ds_z2_config.json\n",
        train=_FACTORY_TRAIN.replace("1.0e-4", "1.0e-5"),
    ),
    "freeze": _factory(
        "stage: sft\nfinetuning_type: freeze\nfreeze_trainable_layers: 1\n"
        "freeze_trainable_modules: all\nuse_llama_pro: true\n"
    ),
    "qlora": _factory(
        f"stage: sft\n{_FACTORY_LORA}quantization_bit: 4\nquantization_method: bnb\n"
        "double_quantization: false\n"
    ),
    "qlora-8": _factory(f"stage: sft\n{_FACTORY_LORA}quantization_bit: 8\n"),
    "packing": _factory(f"stage: sft\n{_FACTORY_LORA}packing: true\n"),
    "neat-packing": _factory(f"stage: sft\n{_FACTORY_LORA}neat_packing: true\nflash_attn: fa2\n"),
    "pissa": _factory(f"stage: sft\n{_FACTORY_LORA}pissa_init: true\npissa_iter: 16\n"),
    "dora": _factory(f"stage: sft\n{_FACTORY_LORA}use_dora: true\nuse_rslora: true\n"),
    "loraplus": _factory(f"stage: sft\n{_FACTORY_LORA}loraplus_lr_ratio: 16.0\n"),
    "alpha": _factory(
        "stage: sft\nfinetuning_type: lora\nlora_rank: 16\nlora_alpha: 16\nlora_dropout: 0.1\n"
        "lora_target: q_proj,v_proj\nadditional_target: embed_tokens,lm_head\n"
    ),
    "galore": _factory(
        "stage: sft\nfinetuning_type: full\nuse_galore: true\ngalore_layerwise: true\n"
        "galore_target: mlp,self_attn\ngalore_rank: 128\npure_bf16: true\n"
    ),
    "badam": _factory(
        "stage: sft\nfinetuning_type: full\nuse_badam: true\nbadam_mode: layer\n"
        "badam_switch_interval: 50\n"
    ),
    "oft": _factory("stage: sft\nfinetuning_type: oft\noft_block_size: 32\noft_target: all\n"),
    "tokens": _factory(
        f'stage: sft\n{_FACTORY_LORA}add_special_tokens: "<think>,</think>"\nresize_vocab: true\n'
    ),
    "eval-set": _factory(
        f"stage: sft\n{_FACTORY_LORA}",
        _FACTORY_DATA + "eval_dataset: alpaca_en_demo\nmask_history: true\n",
        _FACTORY_TRAIN + "eval_strategy: epoch\n",
    ),
    "unsloth": _factory(
        f"stage: sft\n{_FACTORY_LORA}use_unsloth: true\nenable_liger_kernel: true\n"
        "neftune_noise_alpha: 5\nrope_scaling: linear\nshift_attn: true\nupcast_layernorm: true\n"
    ),
    "swanlab": _factory(
        f"stage: sft\n{_FACTORY_LORA}use_swanlab: true\nswanlab_run_name: test\n"
        "train_on_prompt: true\n"
    ),
    "fp16": _factory(f"stage: sft\n{_FACTORY_LORA}", train=_FACTORY_TRAIN.replace("bf16", "fp16")),
}

_TRL_TRAIN = (
    "learning_rate: 2.0e-5\nnum_train_epochs: 1\nper_device_train_batch_size: 2\n"
    "gradient_accumulation_steps: 8\ngradient_checkpointing: true\nlogging_steps: 25\n"
    "eval_strategy: steps\neval_steps: 100\nreport_to: [wandb]\npush_to_hub: true\n"
)
_TRL_PEFT = "use_peft: true\nlora_r: 32\nlora_alpha: 16\n"


def _trl(own: str, train: str = _TRL_TRAIN) -> str:
    return f"model_name_or_path: org/model\noutput_dir: my-model\n{train}{own}"


def _handbook(own: str) -> str:
    return (
        "model_name_or_path: org/model\ntorch_dtype: bfloat16\nattn_implementation: "
        "flash_attention_2\npreprocessing_num_workers: 12\nbf16: true\ndo_eval: true\n"
        "evaluation_strategy: epoch\ngradient_accumulation_steps: 2\ngradient_checkpointing: true\n"
        "gradient_checkpointing_kwargs: {use_reentrant: false}\nhub_model_id: my-model\n"
        "hub_strategy: every_save\nlog_level: info\nlogging_strategy: steps\nlogging_steps: 5\n"
        "lr_scheduler_type: cosine\nmax_steps: -1\nnum_train_epochs: 1\noutput_dir: data/my-model\n"
        "overwrite_output_dir: true\nper_device_eval_batch_size: 8\n"
        "per_device_train_batch_size: 16\npush_to_hub: true\nremove_unused_columns: true\n"
        "report_to: [tensorboard]\nsave_strategy: epoch\nsave_total_limit: null\nseed: 42\n"
        f"warmup_ratio: 0.1\n{own}"
    )


TRL: dict[str, str] = {
    "sft": _trl("dataset_name: org/chats\npacking: true\nmax_length: 2048\n"),
    "sft-peft": _trl(f"dataset_name: org/chats\n{_TRL_PEFT}assistant_only_loss: true\n"),
    "sft-qlora": _trl(f"dataset_name: org/chats\n{_TRL_PEFT}load_in_4bit: true\n"),
    "sft-split": _trl(
        "dataset_name: org/chats\ndataset_config: en\ndataset_train_split: train_sft\n"
        "dataset_test_split: test_sft\nmax_seq_length: 512\n"
    ),
    "sft-mixture": _trl(
        "dataset_mixture:\n  datasets:\n    - {id: org/a, config: SFT, split: one, weight: 0.5}\n"
        "    - {id: org/b, columns: [messages], weight: 1.0}\n  seed: 0\n  test_split_size: 0.1\n"
        "packing: true\npacking_strategy: wrapped\neos_token: <|im_end|>\nmax_length: 4096\n"
    ),
    "sft-text": _trl(
        "dataset_name: rows.jsonl\ndataset_text_field: body\nuse_liger_kernel: true\n"
    ),
    "sft-min-lr": _trl(
        "dataset_name: org/chats\nlr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs: {min_lr_rate: 0.1}\nwarmup_steps: 0.05\nmax_grad_norm: 0.2\n"
    ),
    "sft-chatml": _trl("dataset_name: org/chats\nchat_template: chatml\ndtype: float16\n"),
    "handbook-sft": _handbook(
        'chat_template: "{% for message in messages %}{{ message.content + eos_token }}'
        '{% endfor %}"\ndataset_mixer:\n  org/ultrachat: 1.0\n'
        "dataset_splits: [train_sft, test_sft]\nlearning_rate: 2.0e-05\nmax_seq_length: 2048\n"
    ),
    "handbook-dpo": _handbook(
        "dataset_mixer:\n  org/ultrafeedback: 1.0\ndataset_splits: [train_prefs, test_prefs]\n"
        "beta: 0.01\nlearning_rate: 5.0e-7\nmax_length: 1024\nmax_prompt_length: 512\n"
        "optim: adamw_torch\n"
    ),
    "handbook-dpo-qlora": _handbook(
        "use_peft: true\nload_in_4bit: true\nlora_r: 128\nlora_alpha: 128\nlora_dropout: 0.05\n"
        "lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]\n"
        "dataset_mixer:\n  org/ultrafeedback: 0.5\nbeta: 0.01\nmax_length: 1024\n"
        "max_prompt_length: 512\noptim: paged_adamw_32bit\n"
    ),
    "apo": _trl("dataset_name: org/pairs\nbeta: 0.1\nloss_type: apo_zero\nmax_length: 1024\n"),
    "mpo": _trl(
        "dataset_name: org/pairs\nbeta: 0.1\nloss_type: [sigmoid, bco_pair, sft]\n"
        "loss_weights: [0.8, 0.2, 1.0]\nprecompute_ref_log_probs: true\n"
    ),
    "kto": _trl(f"dataset_name: org/labelled\ndesirable_weight: 1.2\nbeta: 0.1\n{_TRL_PEFT}"),
    "reward": _trl("dataset_name: org/pairs\ncenter_rewards_coefficient: 0.01\nmax_length: 2048\n"),
    "grpo": _trl(
        f"dataset_name: org/questions\nnum_generations: 8\nmax_completion_length: 256\n{_TRL_PEFT}"
        "reward_funcs: [accuracy_reward, think_format_reward]\nreward_weights: [1.0, 0.5]\n"
        "use_vllm: true\nvllm_mode: colocate\nloss_type: dr_grpo\nscale_rewards: false\n"
    ),
    "grpo-many": _trl(
        "dataset_name: org/questions\nnum_generations: 16\nmax_completion_length: 2048\n"
        "max_prompt_length: 512\nreward_funcs: rewards.score\nnum_iterations: 2\nsave_steps: 25\n"
        "temperature: 0.7\nmax_steps: 100\nlog_completions: true\nsystem_prompt: Think.\n"
    ),
    "command-sft": "trl sft --model_name_or_path org/model --dataset_name org/chats "
    "--learning_rate 2.0e-5 --num_train_epochs 1 --packing --per_device_train_batch_size 2 "
    "--gradient_accumulation_steps 8 --eos_token '<|im_end|>' --eval_strategy steps "
    "--eval_steps 100 --output_dir Qwen2-0.5B-SFT --push_to_hub",
    "command-sft-peft": "python trl/scripts/sft.py \\\n    --model_name_or_path org/model \\\n"
    "    --dataset_name org/chats \\\n    --learning_rate 2.0e-4 \\\n    --use_peft \\\n"
    "    --lora_r 32 \\\n    --lora_alpha 16 \\\n    --output_dir Qwen2-SFT",
    "command-dpo": "accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml "
    "--num_processes 8 examples/scripts/dpo.py --dataset_name org/pairs --dataset_streaming "
    "--model_name_or_path org/model --learning_rate 5.0e-7 --num_train_epochs 1 "
    "--per_device_train_batch_size 2 --max_steps 1000 --gradient_accumulation_steps 8 "
    "--eval_strategy steps --eval_steps 50 --output_dir Qwen2-DPO --no_remove_unused_columns",
    "command-kto": "python trl/scripts/kto.py --dataset_name org/labelled --model_name_or_path "
    "org/model --per_device_train_batch_size 16 --num_train_epochs 1 --learning_rate 5e-7 "
    "--lr_scheduler_type=cosine --gradient_accumulation_steps 1 --eval_steps 500 --output_dir kto "
    "--warmup_steps 0.1 --report_to wandb --logging_first_step",
    "command-reward": "python examples/scripts/reward_modeling.py --model_name_or_path org/model "
    "--dataset_name org/pairs --output_dir Qwen2-Reward --per_device_train_batch_size 8 "
    "--num_train_epochs 1 --learning_rate 1.0e-5 --eval_strategy steps --max_length 2048",
    "command-orpo": "torchrun --nproc_per_node=4 examples/scripts/orpo.py --dataset_name org/pairs "
    "--model_name_or_path=org/model --per_device_train_batch_size 4 --max_steps 1000 "
    "--learning_rate 8e-5 --gradient_accumulation_steps 1 --optim rmsprop --warmup_steps 150 "
    "--bf16 --use_peft --lora_r=16 --lora_alpha=16 --lora_target_modules=all-linear",
    "command-cpo": "python examples/scripts/cpo.py --dataset_name org/pairs --model_name_or_path "
    "org/model --loss_type simpo --simpo_gamma 0.5 --beta 2.0 --max_steps 1000 "
    "--learning_rate 8e-6",
    "command-grpo": "accelerate launch trl/scripts/grpo.py --model_name_or_path org/model "
    "--dataset_name org/questions --reward_funcs accuracy_reward --num_generations 8 "
    "--per_device_train_batch_size 8 --max_completion_length 128 --beta 0.04 --bf16 True",
    "command-rloo": "trl rloo --model_name_or_path org/model --dataset_name org/questions "
    "--reward_model_name_or_path org/classifier --num_generations 2 --max_completion_length 64",
}
