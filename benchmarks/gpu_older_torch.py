"""Lets every process of an environment run with torch 2.11, whose attention by documents takes
grouped heads by itself. `gpu_carry.sh` carries it as `sitecustomize.py`."""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "torch.nn.attention.varlen"


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The module's own specification, whose loader fits it."""
        spec = PathFinder.find_spec(name, path, target) if name == _MODULE else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                fit(module)

            spec.loader.exec_module = exec_module
        return spec


def fit(module: Any) -> None:
    """Let `varlen_attn` take `enable_gqa`, if it does not."""
    import inspect

    kernel = module.varlen_attn
    if "enable_gqa" in inspect.signature(kernel).parameters:
        return

    def varlen_attn(*args: Any, enable_gqa: bool = False, **more: Any) -> Any:
        return kernel(*args, **more)

    module.varlen_attn = varlen_attn


sys.meta_path.insert(0, _Finder)
