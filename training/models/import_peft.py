"""Imports peft without torch's compiler. Import this module before any other that imports peft.

peft imports bitsandbytes, which compiles its fallback kernels with torch: loading the compiler
takes most of a second in every process. Later compilations still work.
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
