"""Give device memory back, after an error too."""

from __future__ import annotations

import gc
import traceback

import torch


def free_memory() -> None:
    """Give back what nobody holds any more, PyTorch's cached blocks too."""
    gc.collect()
    torch.cuda.empty_cache()  # nothing, where CUDA has not started


def release(error: BaseException) -> None:
    """Clear the local variables that an error's traceback keeps alive, tensors among them; its text
    stays whole.
    """
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
