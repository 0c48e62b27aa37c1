"""Free device memory, also after an error."""

from __future__ import annotations

import gc
import traceback

import torch


def free_memory() -> None:
    """Free unreferenced objects and PyTorch's cached blocks."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing before CUDA has started


def release(error: BaseException) -> None:
    """Clear the local variables that an error's traceback keeps alive, tensors among them.

    The error's text stays complete.
    """
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
