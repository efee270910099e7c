"""The command finray in this process, with what only this process sees of its GPU.

    gpu_probe.py FACTS [--watch] train recipe.yaml --local

FACTS receives JSON: the peak of the memory; with --watch, how often the host waited for the GPU in
a step, and how long the GPU's kernels took.
"""

import atexit
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

WAITS = (14, 16)
"""Steps, counted from 0, in which waits are counted: from the first to before the last."""
KERNELS = (16, 18)
"""The same for the time of kernels; `log.every_steps` divides all of these."""
STEPS = KERNELS[1] + 2
_SHOWN = 10


class Watch:
    """Looks at some steps of a training."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}
        self._caught: Any = None
        self._warnings: list[Any] = []
        self._profile: Any = None

    def install(self) -> None:
        """Look when the Trainer asks for the batches of a step."""
        from finray.training.engine.trainer import StreamTrainer

        original: Any = StreamTrainer.get_batch_samples

        def get_batch_samples(trainer: Any, *args: Any) -> Any:
            self._before(trainer.state.global_step)
            return original(trainer, *args)

        StreamTrainer.get_batch_samples = get_batch_samples

    def _before(self, step: int) -> None:
        actions = (
            (WAITS[0], self._start_waits),
            (WAITS[1], self._stop_waits),
            (KERNELS[0], self._start_kernels),
            (KERNELS[1], self._stop_kernels),
        )
        for action in [action for at, action in actions if at == step]:
            try:
                action()
            except Exception as error:  # noqa: BLE001 - the run's own figures count more
                self.facts[action.__name__] = f"{type(error).__name__}: {error}"[:200]

    def _start_waits(self) -> None:
        import torch

        self._caught = warnings.catch_warnings(record=True)
        self._warnings = self._caught.__enter__()
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")

    def _stop_waits(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        self._caught.__exit__(None, None, None)
        places = Counter(
            f"{'/'.join(Path(one.filename).parts[-2:])}:{one.lineno}"
            for one in self._warnings
            if "synchroniz" in str(one.message)
        )
        self.facts["waits_per_step"] = places.total() / (WAITS[1] - WAITS[0])
        self.facts["waits_at"] = places.most_common(_SHOWN)

    def _start_kernels(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        on_gpu = torch.cuda.is_available()
        kind = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
        if on_gpu:
            torch.cuda.synchronize()
        self._profile = profile(activities=[kind])
        self._profile.start()

    def _stop_kernels(self) -> None:
        import torch

        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        self._profile.stop()
        name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        steps = KERNELS[1] - KERNELS[0]
        times = [
            (event.key, getattr(event, name) / steps) for event in self._profile.key_averages()
        ]
        times.sort(key=lambda pair: -pair[1])
        self.facts["kernel_seconds_per_step"] = round(sum(time for _, time in times) / 1e6, 6)
        self.facts["kernels_ms_per_step"] = [
            (key[:80], round(time / 1e3, 3)) for key, time in times[:_SHOWN]
        ]


def main() -> int:
    """Run the command, and write the facts when the process ends."""
    import torch

    facts, arguments = Path(sys.argv[1]), sys.argv[2:]
    watch = Watch()
    if arguments[0] == "--watch":
        arguments = arguments[1:]
        watch.install()

    def write() -> None:
        seen = dict(watch.facts)
        if torch.cuda.is_available():
            seen["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
            seen["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)
            seen["retries_of_allocations"] = torch.cuda.memory_stats().get("num_alloc_retries", 0)
        facts.write_text(json.dumps(seen), encoding="utf-8")

    atexit.register(write)
    from finray.cluster.cli.main import main as finray

    return finray(arguments)


if __name__ == "__main__":
    sys.exit(main())
