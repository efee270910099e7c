"""Process groups by which the CPUs of the workers exchange values, so that no GPU waits."""

from datetime import timedelta

import torch.distributed as dist

LONGEST = timedelta(days=1)
"""Time for which workers wait for the slowest, such as one that writes to a slow storage. One that
ends, or hangs, ends the others long before, unless scale.hang_timeout is null."""


def cpu_group() -> dist.ProcessGroup:
    """A new group of all workers, which all of them make together."""
    made: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=LONGEST)
    return made
