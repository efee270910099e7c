"""Loads peft without torch's compiler; to be imported before anything that loads peft.

peft loads bitsandbytes, which has torch compile the fallbacks of its kernels, and that loads the
compiler: most of a second in every process. What is compiled later still is.
"""

import os

_SWITCH = "TORCHDYNAMO_DISABLE"

_before = os.environ.get(_SWITCH)
os.environ[_SWITCH] = "1"
try:
    import peft  # noqa: F401
finally:
    if _before is None:
        del os.environ[_SWITCH]
    else:
        os.environ[_SWITCH] = _before
