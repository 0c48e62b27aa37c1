"""Fixtures of the tests marked `gpu`: a device, and models with random weights.

The tests need a CUDA device. `NOREGRET_GPU_TESTS=cpu` runs them on the CPU, on tiny models. Both
sides of each comparison are then computed on the CPU, which shows only that the tests work.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.shapes import QWEN25_05B, tiny

if TYPE_CHECKING:
    OpenPack = Callable[..., tuple[Any, list[Any]]]

PROMPT, COMPLETION = 32, 16
"""Tokens of the problems that the tests train on."""


@pytest.fixture(scope="session", autouse=True)
def _fixed_products() -> None:
    """Set what cuBLAS needs for products that are equal to the bit.

    It is read before the first product.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session")
def device() -> str:
    """Return the tested device."""
    return os.environ.get("NOREGRET_GPU_TESTS", "cuda")


@pytest.fixture(scope="session")
def model_of(device: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that writes a random model as wide as Qwen2.5-0.5B; tiny on a CPU."""
    from tests.gpu.shapes import write_model

    folder = tmp_path_factory.mktemp("models")

    def make(layers: int = 4, vocab_size: int = QWEN25_05B.vocab_size) -> Path:
        shape = replace(QWEN25_05B, num_hidden_layers=layers, vocab_size=vocab_size)
        return write_model(
            folder / f"{layers}-{vocab_size}", tiny(shape) if device == "cpu" else shape, device
        )

    return make


@pytest.fixture
def open_pack(model_of: Callable[..., Path], device: str, tmp_path: Path) -> Iterator[OpenPack]:
    """Return a function that opens a pack with a member for each dictionary of keys.

    Adapter weights are not zero. `on` is the device, by default the tested one.
    """
    from tests.gpu import ours
    from tests.gpu.shapes import write_problems

    with ExitStack() as stack:

        def make(*members: dict[str, Any], on: str | None = None, model: Path | None = None) -> Any:
            data = write_problems(tmp_path, PROMPT, rows=64)
            sizes = {"prompts": 2, "samples": 4, "prompt": PROMPT, "completion": COMPLETION}
            path = model or model_of()
            recipes = [
                ours.compose(
                    "base",
                    ours.overrides(
                        path, data, on or device, **sizes, **{ours.DTYPE: "float32", **keys}
                    ),
                )
                for keys in members or ({},)
            ]
            pack_folder = tmp_path / f"pack{len(list(tmp_path.glob('pack*')))}"
            pack_folder.mkdir()
            pack, joined = stack.enter_context(ours.opened(recipes, pack_folder))
            stack.enter_context(ours.synthetic(pack))
            for seed, member in enumerate(joined):
                ours.shake(member, seed)
            return pack, joined

        yield make
