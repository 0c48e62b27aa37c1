"""The digest of a recipe, and the keys that do not make another experiment."""

from __future__ import annotations

import functools
import hashlib
import json
import operator
from collections.abc import Sequence
from typing import Any, Literal

from harness.config.recipe import to_dict
from harness.config.schema import Recipe

# What a key can be exempt from:
#   digest        it is no part of the recipe's digest
#   run           it may differ when a run is resumed
#   sweep         it may differ when a sweep is resumed
#   expectations  overriding it leaves `expect` valid
Rule = Literal["digest", "run", "sweep", "expectations"]

# Names and places of directories.
PLACE_KEYS = ("trainer.run_name", "trainer.ckpt_path", "trainer.resume_mode")

# By key, or by the beginning of keys.
_EXEMPT: dict[str, tuple[Rule, ...]] = {
    # How and where a run is computed.
    "trainer.placement.": ("run", "expectations"),
    "trainer.micro_": ("run", "expectations"),
    # A run may choose it itself, and then writes it into its recipe.
    "trainer.max_tokens_per_microbatch": ("digest", "run", "expectations"),
    "trainer.gradient_checkpointing": ("run", "expectations"),
    "trainer.num_threads": ("run", "expectations"),
    "trainer.logger": ("run", "sweep", "expectations"),
    "generator.num_inference_engines": ("run", "expectations"),
    "generator.inference_engine_tensor_parallel_size": ("run", "expectations"),
    "generator.gpu_memory_utilization": ("run", "expectations"),
    "ray.address": ("digest", "run", "expectations"),
    # Where results go, and what is kept.
    **dict.fromkeys(PLACE_KEYS, ("digest", "sweep", "expectations")),
    "trainer.project_name": ("expectations",),
    "trainer.samples_per_dump": ("expectations",),
    "trainer.max_ckpts_to_keep": ("expectations",),
    "expect": ("digest",),
    # Expectations are about a mean over seeds, and about one run.
    "seed": ("expectations",),
    "trainer.seed": ("expectations",),
    "sweep": ("expectations",),
    # A sweep can get more trials, and compute them in other packs.
    "sweep.num_trials": ("sweep",),
    "sweep.max_concurrent": ("sweep",),
    "sweep.pack_size": ("sweep",),
    "sweep.sampler": ("sweep",),
    "sweep.max_failures": ("sweep",),
    "sweep.stall_seconds": ("sweep",),
    "sweep.pruner": ("sweep",),
    # The study compares these itself, with better messages.
    "sweep.space": ("sweep",),
    "sweep.metric": ("sweep",),
    "sweep.seeds": ("sweep",),
}

# Keys that are younger than some run directories: with one of these values, a digest is what it was
# before there was the key.
YOUNGER: dict[str, tuple[Any, ...]] = {
    "deterministic": (False,),
    "trainer.gradient_checkpointing": ("auto", False),
    "generator.engine_args": ({},),
    "data.question_column": (None,),
    "data.answer_column": (None,),
    "trainer.policy.model.lora.expert_rank": (None,),
    "trainer.critic.model.lora.expert_rank": (None,),
    "trainer.policy.model.lora.adapter_path": (None,),
    "trainer.reference": ("base",),
}


def exempt_from(rule: Rule) -> tuple[str, ...]:
    """Return the keys and prefixes of keys that are exempt from a rule, for `str.startswith`."""
    return tuple(key for key, rules in _EXEMPT.items() if rule in rules)


def recipe_digest(recipe: Recipe) -> str:
    """Return the SHA-256 of a resolved recipe: equal digests mean the same experiment."""
    return _digest(recipe, exempt_from("digest"))


def is_recipe_digest(recorded: str, recipe: Recipe) -> bool:
    """Return whether a digest in a manifest is a recipe's.

    Older manifests have digests that include `trainer.max_tokens_per_microbatch`.
    """
    return recorded in (recipe_digest(recipe), older_digest(recipe))


def older_digest(recipe: Recipe) -> str:
    """Return the digest as older manifests have it."""
    exempt = exempt_from("digest")
    return _digest(recipe, [key for key in exempt if key != "trainer.max_tokens_per_microbatch"])


def _digest(recipe: Recipe, exempt: Sequence[str]) -> str:
    values = to_dict(recipe)
    for key in (*exempt, *YOUNGER):
        *groups, leaf = key.split(".")
        group = functools.reduce(operator.getitem, groups, values)
        if key in exempt or group[leaf] in YOUNGER[key]:
            del group[leaf]
    if not values["ray"]:
        del values["ray"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
