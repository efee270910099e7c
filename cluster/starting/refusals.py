"""Kinds of training that finray does not have, by the settings that ask for them."""

from .draft import Draft

_DIFFUSION = "a diffusion model; finray trains models that predict the next token"
_TEACHER = "distillation from a teacher, which finray does not have"
_SERVICE = "trains on a service; finray trains on your own machines"
_ASKED = {
    "process_reward_model": "no method of finray rates single steps",
    "diffusion": _DIFFUSION,
    "diffusion_lm": _DIFFUSION,
    "diffusion_decision": _DIFFUSION,
    "kd_trainer": _TEACHER,
    "teacher_model_name_or_path": _TEACHER,
    "hatchery": _SERVICE,
    "coreweave": _SERVICE,
    "nemo_gym_enabled": "rewards from environments of NeMo Gym; finray's are functions and models",
}
_PLUGINS = {
    "diffusion": _DIFFUSION,
    "kd": _TEACHER,
    "hatchery": _SERVICE,
    "coreweave": _SERVICE,
}
"""Why finray does not take an Axolotl plugin, by its package."""
_MEDIA = "rows with images, videos or sounds, and finray trains text alone"
_MEDIA_SETTINGS = (
    *("image_size", "image_resize_algorithm", "freeze_mm_modules", "role_boundaries"),
    *("media_dir", "image_max_pixels", "image_min_pixels", "image_resolution", "crop_to_patches"),
    *("video_max_pixels", "video_min_pixels", "video_resolution", "video_fps", "video_maxlen"),
    *("use_audio_in_video", "audio_sampling_rate", "visual_inputs", "train_mm_proj_only"),
    "image_column",
)


def refuse_other_training(draft: Draft) -> None:
    """Refuse what finray could only train as something else.

    Raises:
        InputError: naming the setting, and what it asks for.
    """
    settings = draft.settings
    for name, what in _ASKED.items():
        if settings.value(name) not in (None, False):
            raise draft.refusal(name, what)
    for name in settings.texts("plugins"):
        for package in name.split("."):
            if package in _PLUGINS:
                raise draft.refusal("plugins", f"{name}: {_PLUGINS[package]}")
    for name in _MEDIA_SETTINGS:
        if settings.value(name) not in (None, False):
            raise draft.refusal(name, f"{_MEDIA}; for rows of text, remove it")
    if settings.value("processor_type") is not None and settings.flag("skip_prepare_dataset"):
        what = f"{_MEDIA}; for rows of text, remove it and skip_prepare_dataset"
        raise draft.refusal("processor_type", what)
