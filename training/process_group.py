"""How Ray Train's workers form their process group: over the interface that all of them reach."""

from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig

from .network import choose_interface

_TorchBackend: Any = TorchConfig().backend_cls


@dataclass
class _Config(TorchConfig):
    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


def torch_config() -> TorchConfig:
    """Ray Train's own, but that each worker first chooses its interface."""
    return _Config()
