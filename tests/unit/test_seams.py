"""Private and developer APIs of the libraries underneath, with the signatures that finray uses.

An upgrade that changes one of them fails here, by name, before any training does.
"""

import importlib
import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest

SIGNATURES = {
    # transformers' Trainer, as engine/trainer.py overrides and calls it
    "transformers.Trainer.create_optimizer": "self model",
    "transformers.Trainer.get_train_dataloader": "self",
    "transformers.Trainer.get_batch_samples": "self epoch_iterator num_batches device",
    "transformers.Trainer._prepare_inputs": "self inputs",
    "transformers.Trainer.floating_point_ops": "self inputs",
    "transformers.Trainer.log": "self logs start_time",
    "transformers.Trainer.compute_loss": "self model inputs return_outputs num_items_in_batch",
    "transformers.Trainer.training_step": "self model inputs num_items_in_batch",
    "transformers.Trainer._get_grad_norm": "self model grad_norm",
    "transformers.Trainer._maybe_log_save_evaluate": (
        "self tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time learning_rate"
    ),
    "transformers.Trainer._load_from_checkpoint": "self resume_from_checkpoint model",
    "transformers.Trainer._load_optimizer_and_scheduler": "self checkpoint",
    "transformers.Trainer._load_rng_state": "self checkpoint",
    "transformers.Trainer._save_scaler": "self output_dir",
    "transformers.Trainer.get_decay_parameter_names": "self model",
    "transformers.trainer_pt_utils.safe_globals": "",
    "transformers.Trainer.train": "self resume_from_checkpoint trial ignore_keys_for_eval",
    # transformers' loading, as export/skeleton.py repeats it without weights
    "transformers.conversion_mapping.get_model_conversion_mapping": (
        "model key_mapping hf_quantizer add_legacy"
    ),
    "transformers.quantizers.quantizers_utils.should_convert_module": "full_name patterns",
    "transformers.utils.chat_template_utils._render_with_assistant_indices": (
        "compiled_template messages tools documents add_generation_prompt template_kwargs"
    ),
    "transformers.utils.chat_template_utils._compile_jinja_template": "chat_template",
    "trl.chat_template_utils.get_training_chat_template": "processing_class tokenizer",
    "transformers.core_model_loading.revert_weight_conversion": "model state_dict",
    "transformers.core_model_loading.WeightConverter.convert": (
        "self layer_name model config hf_quantizer loading_info"
    ),
    "transformers.core_model_loading.WeightConverter.add_tensor": (
        "self target_key source_key source_pattern future"
    ),
    # transformers' cache, as rollouts copy a prompt's for all of its completions
    "transformers.cache_utils.Cache.reorder_cache": "self beam_idx",
    # transformers' quantisers, which models/quantiser.py extends
    "transformers.quantizers.auto.register_quantizer": "name",
    "transformers.quantizers.auto.register_quantization_config": "method",
    "transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer.param_needs_quantization": (
        "self model param_name kwargs"
    ),
    "transformers.quantizers.quantizer_bnb_4bit.Bnb4BitHfQuantizer"
    "._process_model_before_weight_loading": "self model device_map kwargs",
    "transformers.quantizers.base.HfQuantizer.get_modules_to_not_convert": (
        "model skip_modules keep_in_fp32_modules add_default_skips"
    ),
    # torch
    "torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model": (
        "module params_and_buffers_to_ignore"
    ),
    # datasets, as data/splits.py and data/hub.py ask it
    "datasets.data_files._get_data_files_patterns": "pattern_resolver",
    "datasets.data_files.sanitize_patterns": "patterns",
    "datasets.ReadInstruction.from_spec": "spec",
    "datasets.ReadInstruction.to_absolute": "self name2len",
    # PEFT
    "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers": (
        "peft_config model conversions"
    ),
    "peft.tuners.tuners_utils._check_lora_target_modules_mamba": "peft_config model target_name",
    "peft.tuners.lora.layer.ParamWrapper.get_delta_weight": "self adapter_name args kwargs",
    "peft.get_peft_model_state_dict": (
        "model state_dict adapter_name unwrap_compiled save_embedding_layers"
    ),
    "peft.set_peft_model_state_dict": (
        "model peft_model_state_dict adapter_name ignore_mismatched_sizes low_cpu_mem_usage"
    ),
    "peft.get_peft_model": (
        "model peft_config adapter_name mixed autocast_adapter_dtype revision low_cpu_mem_usage"
    ),
    "peft.utils.other.get_pattern_key": "pattern_keys key_to_match",
    "peft.PeftModel.set_adapter": "self adapter_name inference_mode",
    "peft.PeftModel.add_adapter": (
        "self adapter_name peft_config low_cpu_mem_usage autocast_adapter_dtype"
    ),
    "peft.PeftModel.save_pretrained": (
        "self save_directory safe_serialization selected_adapters save_embedding_layers "
        "is_main_process path_initial_model_for_weight_conversion kwargs"
    ),
    "peft.PeftModel.create_or_update_model_card": "self output_dir",
    "peft.tuners.lora.LoraModel.unload": "self",
    # bitsandbytes
    "bitsandbytes.functional.dequantize_4bit": ("A quant_state absmax out blocksize quant_type"),
    # Ray Train's developer API, as launch/ray_backend.py and launch/ray_workers.py use it
    "ray.train.backend.Backend.on_start": "self worker_group backend_config",
    "ray.train.backend.Backend.on_shutdown": "self worker_group backend_config",
    "ray.train.v2._internal.execution.worker_group.WorkerGroup.execute": (
        "self fn fn_args fn_kwargs"
    ),
    "ray.train.v2._internal.execution.worker_group.WorkerGroup.execute_single": (
        "self rank fn fn_args fn_kwargs"
    ),
    "ray.train.v2._internal.execution.worker_group.WorkerGroup.execute_async": (
        "self fn fn_args fn_kwargs"
    ),
    "ray.train.v2.api.data_parallel_trainer.DataParallelTrainer": (
        "train_loop_per_worker train_loop_config backend_config scaling_config run_config "
        "datasets dataset_config resume_from_checkpoint metadata validation_config"
    ),
    "ray.train.WorkerGroupError": "error_message worker_failures",
    # Ray's draining nodes and autoscaler
    "ray._private.state.GlobalState.get_draining_nodes": "self",
    "ray.autoscaler.sdk.request_resources": "num_cpus bundles bundle_label_selectors",
    # Ray Tune's searcher, scheduler and trainable, as tuning/ray_tune.py overrides them
    "ray.tune.search.Searcher.suggest": "self trial_id",
    "ray.tune.search.Searcher.on_trial_complete": "self trial_id result error",
    "ray.tune.schedulers.FIFOScheduler.on_trial_result": "self tune_controller trial result",
    "ray.tune.Trainable.setup": "self config",
    "ray.tune.Trainable.reset_config": "self new_config",
    "ray.tune.Callback.on_trial_recover": "self iteration trials trial info",
}

PROPERTIES = (
    "ray.train.backend.BackendConfig.backend_cls",
    "ray.train.backend.BackendConfig.train_func_context",
    "ray.exceptions.RayActorError.preempted",
)

NAMES = (
    "ray._private.state.state",
    "ray.train.backend.Backend.share_cuda_visible_devices",
    "ray.train.PreemptionError",
    "transformers.PreTrainedModel.get_decoder",
    "transformers.core_model_loading.WeightConverter",
    "transformers.core_model_loading.WeightRenaming",
    "transformers.core_model_loading.dot_natural_key",
    "transformers.core_model_loading.rename_source_key",
    "transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES",
    "transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING",
    "transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "transformers.models.auto.modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "transformers.pytorch_utils.Conv1D",
    "transformers.quantizers.base.HfQuantizer",
    "transformers.trainer.OPTIMIZER_NAME",
    "transformers.trainer.SCHEDULER_NAME",
    "bitsandbytes.nn.Params4bit",
    "bitsandbytes.nn.Linear8bitLt",
    "bitsandbytes.autograd._functions.MatMul8bitFp._backward_cls",
    "bitsandbytes.autograd._functions.MatMul8bitLt._backward_cls",
    "peft.tuners.lora.Linear4bit",
)

WORDS = {
    "transformers.trainer": ("loss_is_scaled_for_ga",),
    "accelerate.accelerator": (
        'os.environ.get("ACCELERATE_BYPASS_DEVICE_MAP", "false") != "true"',
    ),
    "transformers.distributed.fsdp": ("_is_fsdp_managed_module",),
    "transformers.distributed.mixin": ("_is_distributed_loading_by_transformers",),
    "bitsandbytes.nn.modules": ("support_avx512bf16_for_cpu",),
    "bitsandbytes.autograd._functions": ("CAt, subA, _A = ctx.tensors", "A = ctx.A"),
    "peft.tuners.tuners_utils": ("targeted_module_names",),
    "ray.dashboard.modules.job.job_supervisor": ("RAY_JOB_STOP_WAIT_TIME_S",),
}
"""Attributes and variables that only the library's source names."""


def find(name: str) -> Any:
    """The object that a dotted name means: its module is the longest importable part."""
    parts = name.split(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # imports warn of what they deprecate
        for length in range(len(parts), 0, -1):
            try:
                value: Any = importlib.import_module(".".join(parts[:length]))
            except ModuleNotFoundError:
                continue
            for part in parts[length:]:
                value = getattr(value, part)
            return value
    raise AssertionError(f"{name}: no such module")


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature(name: str) -> None:
    assert " ".join(inspect.signature(find(name)).parameters) == SIGNATURES[name]


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_property(name: str) -> None:
    assert isinstance(find(name), property)


@pytest.mark.parametrize("name", NAMES)
def test_a_name(name: str) -> None:
    assert find(name) is not None or name.endswith("state")


@pytest.mark.parametrize(("module", "word"), [(m, w) for m, ws in WORDS.items() for w in ws])
def test_a_word_of_the_source(module: str, word: str) -> None:
    file = Path(str(importlib.util.find_spec(module).origin))  # type: ignore[union-attr]
    package = [file, *file.parent.rglob("*.py")] if file.name == "__init__.py" else [file]
    assert any(word in path.read_text(encoding="utf-8") for path in package), (module, word)


def test_a_change_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def changed(self: Any, model: Any, grad_norm: Any = None, more: Any = None) -> None: ...

    monkeypatch.setattr(transformers.Trainer, "_get_grad_norm", changed)
    with pytest.raises(AssertionError):
        test_a_signature("transformers.Trainer._get_grad_norm")
