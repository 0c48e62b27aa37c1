"""Keep libraries and rewards from what is not theirs: the console, memory for what nobody needs,
the exit status.
"""

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
    """Silence progress bars and known harmless warnings; call before torch is imported for all of
    it to work.

    What goes wrong still shows.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
    from transformers import utils as transformers_utils
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    # The report has both; transformers would import them, for a second or two, to help assistant
    # models guess and to match boxes in pictures.
    for name in ("is_sklearn_available", "is_scipy_available"):
        setattr(transformers_utils, name, lambda: False)


def redirect_output(log: Path) -> None:
    """Send everything this process prints, native code included, to a file's end."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


@contextlib.contextmanager
def exits_are_failures() -> Iterator[None]:
    """Raise RuntimeError where a reward or a library calls `sys.exit`: a run cut short must not end
    with status 0.

    So does any other exception that `except Exception` would let pass, an interrupt and Ray's own
    exit aside.
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
    """Whether an exception is the exit by which Ray ends its processes at SIGTERM, wherever their
    main thread is.
    """
    modules = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return isinstance(error, SystemExit) and any(name.startswith("ray.") for name in modules)
