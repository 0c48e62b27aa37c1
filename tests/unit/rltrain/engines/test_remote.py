"""The parts of remote engines that need no actor."""

from __future__ import annotations

import pytest
import torch

from harness.config.schema import Backend, Recipe
from harness.core.errors import UserError
from rltrain.engines.base import EngineOptions
from rltrain.engines.remote import EngineServer


def test_an_engine_on_the_trainers_own_modules_is_refused() -> None:
    recipe = Recipe()
    recipe.generator.backend = Backend.transformers
    with pytest.raises(UserError, match="got: +generator.backend=transformers"):
        EngineServer().start(recipe, EngineOptions("model", torch.float32, (1,)))
