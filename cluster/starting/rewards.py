"""Sampling and rewards of GRPO and RLOO, by TRL's names."""

from typing import Any, get_args

from ...training.config.methods import GrpoMethod
from ...training.config.rewards import TrlReward
from .draft import Draft, ForeignSettings
from .places import Places

_TRL = get_args(TrlReward.model_fields["trl"].annotation)
_LOSSES = get_args(GrpoMethod.model_fields["loss"].annotation)
_COPIED = {
    "num_generations": "generations",
    "max_completion_length": "max_completion",
    "mask_truncated_completions": "mask_truncated",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "epsilon": "epsilon",
    "epsilon_high": "epsilon_high",
    "num_iterations": "passes",
    "beta": "beta",
}
_COUNTS = ("num_generations", "max_completion_length", "num_iterations")


def online(draft: Draft, places: Places, section: str = "", values: Any = None) -> None:
    """What a method of TRL that samples by itself says.

    Args:
        draft: the draft.
        places: where paths start.
        section: the setting that they stand under; empty where they are the draft's own.
        values: those under the section.
    """
    settings = draft.settings.inside(section, values) if section else draft.settings
    read = {"reward_funcs", "reward_weights", "use_vllm", "loss_type", "scale_rewards"}
    for name, own in _COPIED.items():
        value: float | None
        if name == "mask_truncated_completions":
            value = settings.flag(name)
        elif name in _COUNTS:
            value = settings.whole(name, 1)
        else:
            value = settings.number(name)
        if value is None or (name == "top_k" and value < 0):
            continue
        plain = value if isinstance(value, bool) or value != int(value) else int(value)
        draft.put(f"method.{own}", plain, *([] if section else [name]))
        read.add(name)
    default = 2 if draft.values["method.kind"] == "rloo" else 8
    draft.values.setdefault("method.generations", default)
    draft.values.setdefault("method.max_completion", 512)
    _rewards(draft, settings, section, places)
    if draft.values["method.kind"] == "grpo":
        _loss(draft, settings, section)
    if settings.flag("use_vllm"):
        _vllm(draft, section)
    if section:
        draft.fulfilled("method", section)
        for name, value in settings.values.items():
            if name not in read and value not in (None, "", False, [], {}):
                table = dict(draft.dialect.entries())
                text = table[name].text if name in table and table[name].text else _OTHER
                draft.leave(f"{section}.{name}", text)


_OTHER = "a detail of TRL's trainer that finray does not have"


def _rewards(draft: Draft, settings: ForeignSettings, section: str, places: Places) -> None:
    models = ("reward_model_name_or_path", "reward_model_path")
    rewards = [_reward(name, places) for name in settings.texts("reward_funcs")]
    rewards += [{"model": places.model(name)} for key in models for name in settings.texts(key)]
    weights = settings.numbers("reward_weights")
    for index, reward in enumerate(rewards):
        if index < len(weights) and weights[index] != 1.0:
            reward["weight"] = weights[index]
    keys = [] if section else ["reward_funcs", "reward_weights", *models]
    if not rewards:
        draft.notes.append(
            "method.rewards: the configuration names none; rewards.py:reward is written"
        )
        rewards = [{"file": "rewards.py:reward"}]
    draft.put("method.rewards", rewards, *keys)
    for reward in rewards:
        if "file" in reward:
            draft.notes.append(
                f"{reward['file']}: your own function, which takes prompts, completions, "
                "completion_ids and **columns"
            )


def _reward(name: str, places: Places) -> dict[str, Any]:
    last = name.rpartition(".")[2]
    if last in _TRL:
        return {"trl": last}
    if "/" in name or places.has_folder(name):
        return {"model": places.model(name)}
    module, _, function = name.rpartition(".")
    file = module.replace(".", "/") if module else "rewards"
    return {"file": f"{places.path(f'{file}.py')}:{function}"}


def _loss(draft: Draft, settings: ForeignSettings, section: str) -> None:
    keys = [] if section else ["loss_type"]
    loss = settings.text("loss_type")
    if loss in _LOSSES:
        draft.put("method.loss", loss, *keys)
    elif loss is not None:
        draft.change(f"{section}.loss_type" if section else "loss_type", f"{loss}: dapo instead")
    scale = settings.value("scale_rewards")
    if scale is not None:
        word = {"true": "group", "false": "none"}.get(str(scale).lower(), str(scale))
        draft.put("method.scale_rewards", word, *([] if section else ["scale_rewards"]))


def _vllm(draft: Draft, section: str) -> None:
    adapts = any(key.startswith("adapter.") for key in draft.values)
    name = f"{section}.use_vllm" if section else "use_vllm"
    unfit = ("adapter.dora", "adapter.modules_to_save", "model.add_tokens")
    if (
        adapts
        and "model.quantize" not in draft.values
        and not any(k in draft.values for k in unfit)
    ):
        draft.put("method.rollout", "vllm", *([] if section else ["use_vllm"]))
    else:
        draft.change(name, "rollout: transformers; vLLM needs a plain adapter on 16-bit weights")
