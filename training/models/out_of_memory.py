"""Recognises that a device or the host has no memory left, and computes in smaller parts then."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..common.errors import FinrayError, RunError
from .dtypes import free_memory

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_SIGNS = (
    "out of memory",  # CUDA, HIP, XPU, MPS, NCCL's CUDA calls, bitsandbytes
    "outofmemory",  # hipErrorOutOfMemory
    "out_of_memory",  # CUDA_ERROR_OUT_OF_MEMORY
    "memoryallocation",  # cudaErrorMemoryAllocation
    "alloc_failed",  # CUBLAS_STATUS_, CUDNN_STATUS_, CUSOLVER_STATUS_, CUFFT_, HIPBLAS_STATUS_
    "allocation_failed",  # CUDNN_STATUS_INTERNAL_ERROR_DEVICE_
    "_status_not_initialized",  # cuBLAS, cuDNN, cuSOLVER without room for their workspace
    "hsa_status_error_out_of_resources",  # ROCm
    "allocfailed",  # miopenStatusAllocFailed
    "rocblas_status_memory_error",
    "failed to cuda calloc",  # NCCL
    "out_of_device_memory",  # UR_RESULT_ERROR_, ZE_RESULT_ERROR_
    "out_of_host_memory",
    "can't allocate memory",  # the CPU's allocator
    "cannot allocate memory",  # ENOMEM
    "not enough memory",
    "unable to allocate",  # numpy
    "bad_alloc",
    "bad allocation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """True if a device or the host could not allocate what was requested, or this follows from it.

    Libraries that cannot allocate their workspace say so in their own words.
    """
    link: BaseException | None = error
    while link is not None:
        is_own = isinstance(link, FinrayError)
        if isinstance(link, MemoryError) or (
            not is_own and any(sign in str(link).lower() for sign in _SIGNS)
        ):
            return True
        link = None if is_own else link.__cause__
    return False


def in_fitting_parts(
    items: Sequence[_Item],
    size: int,
    compute: Callable[[Sequence[_Item]], list[_Result]],
    what: str,
    remedy: str,
) -> tuple[list[_Result], int]:
    """The results of all items, computed in parts; out of memory, a part is halved and repeated.

    Args:
        items: what to compute; a result may depend on its own item only.
        size: number of items in a part at first.
        compute: returns a result for each item of a part.
        what: what a part is, for messages: answers.
        remedy: settings that would save memory where a single item does not fit.

    Returns:
        The results, and the size that fits.

    Raises:
        RunError: a single item does not fit.
    """
    results: list[_Result] = []
    while len(results) < len(items):
        part = items[len(results) : len(results) + size]
        try:
            results += compute(part)
            continue
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, FinrayError) or not is_out_of_memory(error):
                raise
            reason = first_line(error)
        if len(part) == 1:
            raise RunError(f"out of memory with one of the {what} at a time ({reason}); {remedy}")
        size = (len(part) + 1) // 2
        free_memory()  # after the error, whose frames hold the part's tensors
    return results, size


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
