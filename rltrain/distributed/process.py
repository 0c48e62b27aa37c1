"""Keep libraries from printing, from loading what is not needed, and from ending the process."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path


def quiet_libraries() -> None:
    """Silence progress bars and known harmless warnings; errors still show.

    Call it before torch is imported for full effect.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    from transformers import utils as transformers_utils
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # transformers would import SciPy for the losses of image models, which takes up to a second.
    transformers_utils.is_scipy_available = lambda: False


def redirect_output(log: Path) -> None:
    """Append everything this process prints, native code included, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


@contextlib.contextmanager
def exits_are_failures() -> Iterator[None]:
    """Raise RuntimeError where a reward or a library calls `sys.exit`.

    A run that was cut short must not end with status 0. Any other exception that is no `Exception`
    is treated likewise, except an interrupt and Ray's own exit.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, (Exception, KeyboardInterrupt, GeneratorExit)) or is_rays_exit(error):
            raise
        what = (
            f"sys.exit({error.code!r}) was called"
            if isinstance(error, SystemExit)
            else f"{error!r} was raised"
        )
        raise RuntimeError(f"{what} in the middle of training") from error


def is_rays_exit(error: BaseException) -> bool:
    """Return whether an exception is the exit by which Ray ends its processes at SIGTERM.

    Ray raises it in the main thread, wherever that is.
    """
    modules = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return isinstance(error, SystemExit) and any(name.startswith("ray.") for name in modules)
