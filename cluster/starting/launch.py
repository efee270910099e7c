"""The GPUs that a configuration, or a command line, is meant for."""

from dataclasses import replace
from pathlib import Path

from ...training.common.errors import InputError
from ...training.common.formatting import shown
from ...training.config.yaml_file import read_foreign_file
from .command_line import CommandLine, visible_gpus
from .draft import Draft, ForeignSettings
from .trainer import Devices, is_stage_3

_TRL_FILES = {"single_gpu": 1, **dict.fromkeys(("multi_gpu", "zero1", "zero2", "zero3"), 8)}
_TRL_FILES |= {"fsdp1": 8, "fsdp2": 8}
"""Processes in the files for accelerate that TRL brings along."""
_SHARDING_OPTIONS = ("use_fsdp", "use_deepspeed", "zero_stage", "deepspeed_config_file")
_SHARDING = ("zero3", "fsdp1", "fsdp2")
_PROCESSES = ("num_processes", "nproc_per_node")


def with_file(command: CommandLine | None, draft: Draft) -> CommandLine | None:
    """The command line, with what a file of TRL says of the launch in its place."""
    settings = draft.settings
    env = settings.value("env")
    variables = (
        {str(key): str(value) for key, value in env.items()} if isinstance(env, dict) else {}
    )
    counts = [settings.whole(name, 1) for name in _PROCESSES]
    own = command or CommandLine()
    processes = own.processes or next(filter(None, counts), None)
    file = own.launch_file or settings.text("accelerate_config")
    processes = processes or visible_gpus(variables, file)
    draft.fulfilled("scale.workers", *_PROCESSES, "accelerate_config")
    if processes or file:
        return replace(own, processes=processes, launch_file=file)
    return command


def devices_of(gpus: int | None, command: CommandLine | None) -> Devices:
    """The GPUs, and whether accelerate's file shards the weights over them.

    Args:
        gpus: as the user says.
        command: the command line, if there is one, with what a file of TRL says of the launch.

    Raises:
        InputError: gpus is below 1, or accelerate's file cannot be read.
    """
    if gpus is not None and (type(gpus) is not int or gpus < 1):
        raise InputError(f"--gpus: expected at least 1, found {shown(gpus)}; give a whole number")
    launched = _launched(command) if command is not None else None
    shards = launched.shards if launched is not None else ""
    if command is not None and not shards:
        shards = _sharded_by_options(command)
    if gpus is not None:
        return Devices(gpus, f"--gpus {gpus}", shards)
    if command is not None and command.processes:
        return Devices(command.processes, "processes that are launched", shards)
    return launched or Devices(1, "1 GPU unless --gpus says more", shards)


def name_launcher_options(draft: Draft, command: CommandLine, devices: Devices) -> None:
    """Say of the launcher's options what becomes of them."""
    does_shard = draft.values.get("scale.strategy") == "fsdp"
    for name, value in command.launcher.items():
        own = name if name not in draft.settings.values else f"the launcher's {name}"
        if does_shard and name in _SHARDING_OPTIONS:
            draft.mapped[own] = f"scale.strategy: fsdp, as {devices.shards or 'the script says'}"
        else:
            draft.leave(
                own, f"{shown(value)}: the launcher's; finray has scale, and jobs for a cluster"
            )


def _sharded_by_options(command: CommandLine) -> str:
    """The launcher's option that shares the weights among the GPUs; empty without one."""
    options = command.launcher
    if options.get("use_fsdp") is True:
        return "--use_fsdp"
    if options.get("zero_stage") == 3:
        return "--zero_stage 3"
    file = options.get("deepspeed_config_file")
    return f"--deepspeed_config_file {file}" if file and is_stage_3(file) else ""


def _launched(command: CommandLine) -> Devices | None:
    """What accelerate's file says; None without one, or where it is not on this machine."""
    name = command.launch_file
    if name is None:
        return None
    if name in _TRL_FILES and not Path(name).is_file():
        shards = f"TRL's {name}" if name in _SHARDING else ""
        return Devices(_TRL_FILES[name], f"num_processes of TRL's {name}", shards)
    if not Path(name).is_file():
        shards = name if is_stage_3(name) or "fsdp" in name.lower() else ""
        return Devices(1, f"1 GPU unless --gpus says more; {name} is not there", shards)
    settings = ForeignSettings(read_foreign_file(Path(name)), name)
    kind = (settings.text("distributed_type") or "").upper()
    deepspeed = settings.inside("deepspeed_config", settings.value("deepspeed_config") or {})
    is_stage = deepspeed.whole("zero_stage") == 3 or is_stage_3(
        deepspeed.text("deepspeed_config_file")
    )
    is_sharded = kind == "FSDP" or (kind == "DEEPSPEED" and is_stage)
    count = settings.whole("num_processes", 1) or 1
    return Devices(count, f"num_processes of {name}", name if is_sharded else "")
