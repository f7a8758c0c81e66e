"""Attention for sm_90 in Gluon. Plain Triton computes the same without it."""

import torch

from unpadded_kernels._triton import triton


def is_supported(device: torch.device) -> bool:
    """Whether the device has compute capability 9.0 and Triton has the Gluon of 3.6 or of 3.9."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0) or triton.knobs.runtime.interpret:
        return False
    try:
        from triton.experimental.gluon.language.nvidia.hopper import tma, warpgroup_mma_init  # noqa: F401
    except ImportError:
        return False
    return hasattr(tma, "async_load") or hasattr(tma, "async_copy_global_to_shared")
