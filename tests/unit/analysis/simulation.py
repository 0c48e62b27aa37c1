"""Sweeps with a known truth, as evidence for the claims: basins over rates, seed noise, divergence,
failures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis.claims import CLAIMS
from analysis.claims.claim import JudgedClaim
from analysis.claims.evidence import ALL, ATTENTION, MLP, Evidence

Floats = NDArray[np.float64]
# The embedded task's: a base of 0.31, 0.93 when trained; the seed spread of a replicated study.
BASE, GAIN, NOISE = 0.31, 0.62, 0.016
STEPS, PER_STEP, RISE_STEPS = 32, 128, 10.0
STEP_NOISE = 0.03
MODEL_PARAMETERS, PARAMETERS_PER_RANK = 750_000, 7_680
# Log10 of the best rate of LoRA at rank 4 and more, and of the rule, where nothing else is said.
BEST = -3.0


@dataclass(frozen=True)
class Arm:
    """The truth of one arm: where it sits, its best score as a share of the gain, its best rate and
    its basin.

    `width` is the bell's standard deviation in decades, or a cliff-edged basin's half width. `slow`
    stretches time.
    """

    rank: int
    alpha: float = 32.0
    targets: float = ALL
    batch: float = 128.0
    height: float = 1.0
    best: float = BEST
    width: float = 0.6
    slow: float = 1.0
    parameters: float | None = None


@dataclass(frozen=True)
class World:
    """A sweep's truth: its arms, each over a grid of rates around its own best, with chance and
    accidents.
    """

    arms: tuple[Arm, ...]
    seeds: int = 3
    rates: int = 8
    step: float = 0.3
    gain: float = GAIN
    noise: float = NOISE
    shape: Literal["bell", "cliff"] = "bell"
    flat: bool = False
    failures: float = 0.02
    diverging: float = 0.9
    rule: float = BEST
    design: dict[str, Floats] = field(default_factory=dict, compare=False, repr=False)

    def columns(self) -> dict[str, Floats]:
        """What does not depend on chance, a column per setting `[N]`; made once."""
        if not self.design:
            parts = []
            for arm in self.arms:
                seed, rate = np.meshgrid(np.arange(float(self.seeds)), np.arange(float(self.rates)))
                one = {
                    name: np.full(seed.size, float(getattr(arm, name)))
                    for name in (
                        "rank",
                        "alpha",
                        "targets",
                        "batch",
                        "height",
                        "best",
                        "width",
                        "slow",
                    )
                }
                counted = (
                    arm.rank * PARAMETERS_PER_RANK if arm.parameters is None else arm.parameters
                )
                parts.append(
                    {
                        **one,
                        "seed": seed.ravel(),
                        "rate": rate.ravel(),
                        "parameters": np.full(seed.size, float(counted or MODEL_PARAMETERS)),
                    }
                )
            self.design.update(
                {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            )
        return self.design

    def draw(self, rng: np.random.Generator, *, curves: bool = False) -> Evidence:
        """One sweep of this world. The grids lie anywhere against the best rates; `curves` adds
        training rewards.
        """
        known = self.columns()
        count = len(known["rank"])
        # Grids of round numbers, the same offset for all arms: each arm's best rate lies anywhere
        # between two of them.
        middle = np.round(known["best"] / self.step) * self.step
        lr = (
            middle
            + (known["rate"] - (self.rates - 1) / 2) * self.step
            + rng.uniform(-0.5, 0.5) * self.step
        )
        kept = (
            np.ones(count) if self.flat else _basin(lr - known["best"], known["width"], self.shape)
        )
        gain = self.gain * known["height"] * kept
        score = np.clip(BASE + gain + rng.normal(0.0, self.noise, count), 0.0, 1.0)
        # Past three widths on the far side a run diverges or not, by chance.
        wild = (
            (lr - known["best"] > 1.6 * known["width"])
            & (rng.random(count) < self.diverging)
            & (not self.flat)
        )
        lost = rng.random(count) < self.failures
        bad = wild & ~lost
        rewards = (
            self._curves(rng, gain, known["slow"], known["seed"])
            if curves
            else np.full((count, 0), math.nan)
        )
        return Evidence(
            rank=known["rank"],
            alpha=np.where(known["rank"] > 0, known["alpha"], math.nan),
            lr=10.0**lr,
            targets=np.where(known["rank"] > 0, known["targets"], math.nan),
            batch=known["batch"],
            budget=np.zeros(count),
            seed=known["seed"],
            score=np.where(bad | lost, math.nan, score),
            bad=bad,
            fallback=np.full(count, math.nan),
            confirm=np.zeros(count, bool),
            parameters=known["parameters"],
            episodes=np.full(count, float(STEPS * PER_STEP)),
            curves=rewards,
            base=BASE,
            model_parameters=float(MODEL_PARAMETERS),
            rule_lr=10.0**self.rule,
        )

    def _curves(self, rng: np.random.Generator, gain: Floats, slow: Floats, seed: Floats) -> Floats:
        """Training rewards `[N, T]`: half the noise is the step's problems, which a seed's runs
        share.
        """
        at = np.arange(1, STEPS + 1)[None, :]
        shared = rng.normal(0.0, STEP_NOISE, (self.seeds, STEPS))[seed.astype(int)]
        own = rng.normal(0.0, STEP_NOISE, (len(gain), STEPS))
        return (
            BASE + gain[:, None] * (1 - np.exp(-at / (RISE_STEPS * slow[:, None]))) + shared + own
        )


def _basin(offset: Floats, width: Floats, shape: str) -> Floats:
    """The share of the gain kept at a distance from the best rate, in decades; 1 at most."""
    if shape == "bell":
        return np.exp(-0.5 * (offset / width) ** 2)
    return _cliff(offset, width) / _cliff(np.linspace(-1.0, 1.0, 201)[:, None], width).max(0)


def _cliff(offset: Floats, width: Floats) -> Floats:
    """A slope below, a plateau, a cliff above, moved so that the middle of what keeps three
    quarters is at 0.
    """
    middle = math.log(3) * (0.15 - 0.06) / 2
    rise, fall = (offset + middle + width) / 0.15, (offset + middle - width) / 0.06
    return 1 / (1 + np.exp(-rise)) / (1 + np.exp(np.minimum(fall, 500.0)))


def by_rank(
    ranks: Mapping[int, Mapping[str, Any]] | None = None,
    *,
    exponent: float = 0.0,
    ratio: float = 9.8,
    **world: Any,
) -> World:
    """Full fine-tuning and ranks 1, 4, 16 and 64 over rates; `ranks` changes arms, `exponent` is
    rank's in the rate.
    """
    arms = []
    for rank in (0, 1, 4, 16, 64):
        best = (
            BEST - math.log10(ratio)
            if rank == 0
            else BEST + exponent * math.log10(max(rank, 4) / 4)
        )
        arm = Arm(rank, best=best, width=0.5 if rank == 0 else 0.7 if rank == 1 else 0.6)
        arms.append(replace(arm, **(ranks or {}).get(rank, {})))
    return World(tuple(arms), **world)


def by_scale(exponent: float, **world: Any) -> World:
    """Ranks 4, 16 and 64 with alpha = 2r."""
    arms = [Arm(r, alpha=2.0 * r, best=BEST + exponent * math.log10(r / 4)) for r in (4, 16, 64)]
    return World(tuple(arms), **world)


def placed(attention: float, everywhere: float = 1.0, **world: Any) -> World:
    """All layers, MLP-only and, at as many parameters, attention-only; heights as shares of
    MLP-only's gain.
    """
    arms = (
        Arm(8, targets=ALL, height=everywhere, parameters=61_440),
        Arm(8, targets=MLP, parameters=36_864),
        Arm(12, targets=ATTENTION, height=attention, parameters=36_864),
    )
    return World(arms, **world)


def batched(costs: Mapping[int, float], **world: Any) -> World:
    """Two batch sizes; `costs` is what the larger takes of each rank's gain."""
    arms = [
        Arm(
            rank,
            batch=batch,
            height=1.0 - cost * (batch > 128),
            best=BEST - (rank == 0),
            width=0.6 - 0.1 * (rank == 0),
        )
        for rank, cost in costs.items()
        for batch in (128.0, 2048.0)
    ]
    return World(tuple(arms), **world)


@dataclass(frozen=True)
class Case:
    """A world and whether a claim is true in it; `reported`: the effect LoRA Without Regret
    reports, or a stand-in.
    """

    claim: str
    name: str
    true: bool
    make: Callable[..., World]
    reported: bool = False

    def verdicts(self, count: int, seed: int = 0, **world: Any) -> Iterator[JudgedClaim]:
        """The claim's verdicts on so many sweeps of this world; `world` overrides its seeds, noise,
        gain or shape.
        """
        truth, rng, claim = (
            self.make(**world),
            np.random.default_rng([seed, hash_of(self.name)]),
            CLAIMS[self.claim],
        )
        for _ in range(count):
            yield claim.verdict(truth.draw(rng, curves=self.claim == "6"))

    def shares(self, count: int, seed: int = 0, **world: Any) -> dict[str, float]:
        """How often each verdict came."""
        found = [verdict.verdict for verdict in self.verdicts(count, seed, **world)]
        return {
            kind: found.count(kind) / count for kind in ("holds", "does not hold", "cannot tell")
        }


def hash_of(name: str) -> int:
    """A number that a name always has, in any process."""
    return int.from_bytes(name.encode()[:8].ljust(8, b"."), "little")


def _by_rank(
    ranks: Mapping[int, Mapping[str, Any]] | None = None, **fixed: Any
) -> Callable[..., World]:
    return lambda **world: by_rank(ranks, **{**fixed, **world})


def _short(rank: int, share: float) -> Callable[..., World]:
    return _by_rank({rank: {"height": 1.0 - share}})


ALL_SAME: dict[int, dict[str, float]] = {
    rank: {"best": BEST, "width": 0.6, "height": 1.0} for rank in (0, 1, 4, 16, 64)
}
NOTHING: dict[str, Any] = {"gain": 0.0}
FLAT: dict[str, Any] = {"flat": True}
CASES = [
    Case("1a", "0.002 behind", True, _by_rank({1: {"height": 1 - 0.002 / GAIN}}), reported=True),
    Case("1a", "a tenth of the gain behind (the margin)", False, _short(1, 0.1)),
    Case("1a", "a fifth of the gain behind", False, _short(1, 0.2)),
    Case("1a", "nothing learns", False, _by_rank(**NOTHING)),
    Case("1b", "0.7 against 0.5 wide", True, _by_rank(), reported=True),
    Case("1b", "as wide", False, _by_rank(ALL_SAME)),
    Case("1b", "narrower", False, _by_rank({1: {"width": 0.45}})),
    Case("1b", "nothing learns", False, _by_rank(**NOTHING)),
    Case("2a", "no dependence", True, _by_rank(), reported=True),
    Case("2a", "exponent -1/4 (the margin)", False, _by_rank(exponent=-0.25)),
    Case("2a", "exponent -1/2", False, _by_rank(exponent=-0.5)),
    Case("2a", "every rate as good", False, _by_rank(**FLAT)),
    Case("2a", "nothing learns", False, _by_rank(**NOTHING)),
    Case("2b", "half as high", True, _by_rank({1: {"best": BEST - 0.3}}), reported=True),
    Case("2b", "as high", False, _by_rank()),
    Case("2b", "every rate as good", False, _by_rank(**FLAT)),
    Case("2c", "exponent -1/2 (muA)", True, lambda **world: by_scale(-0.5, **world), reported=True),
    Case("2c", "exponent -1/4 (the margin)", False, lambda **world: by_scale(-0.25, **world)),
    Case("2c", "no dependence", False, lambda **world: by_scale(0.0, **world)),
    Case("3", "9.8 times", True, _by_rank(), reported=True),
    Case("3", "15 times", True, _by_rank(ratio=15.0)),
    Case("3", "20 times (the margin)", False, _by_rank(ratio=20.0)),
    Case("3", "5 times (the margin)", False, _by_rank(ratio=5.0)),
    Case("3", "the same", False, _by_rank(ALL_SAME)),
    Case("3", "every rate as good", False, _by_rank(**FLAT)),
    Case("4a", "0.05 worse", True, lambda **world: placed(1 - 0.05 / GAIN, **world), reported=True),
    Case("4a", "as good", False, lambda **world: placed(1.0, **world)),
    Case("4a", "better", False, lambda **world: placed(1.05, **world)),
    Case("4b", "as good", True, lambda **world: placed(0.92, **world), reported=True),
    Case(
        "4b",
        "a tenth of the gain better (the margin)",
        False,
        lambda **world: placed(0.92, 1.1, **world),
    ),
    Case(
        "4b",
        "a tenth of the gain worse (the margin)",
        False,
        lambda **world: placed(0.92, 0.9, **world),
    ),
    Case("4b", "nothing learns", False, lambda **world: placed(1.0, **{**NOTHING, **world})),
    Case(
        "5",
        "0.08 more",
        True,
        lambda **world: batched({0: 0.0, 1: 0.13, 16: 0.13, 64: 0.13}, **world),
        reported=True,
    ),
    Case(
        "5", "as much", False, lambda **world: batched({0: 0.1, 1: 0.1, 16: 0.1, 64: 0.1}, **world)
    ),
    Case(
        "5",
        "nothing, and rank 1 alone is spared",
        False,
        lambda **world: batched({0: 0.0, 1: 0.0, 16: 0.13, 64: 0.13}, **world),
    ),
    Case(
        "5",
        "full fine-tuning more",
        False,
        lambda **world: batched({0: 0.1, 1: 0.0, 16: 0.0, 64: 0.0}, **world),
    ),
    Case("6", "the same", True, _by_rank(), reported=True),
    Case("6", "rank 1 a quarter slower (past the margin)", False, _by_rank({1: {"slow": 1.25}})),
    Case("6", "rank 1 a third slower", False, _by_rank({1: {"slow": 1.35}})),
    Case("6", "rank 64 twice as slow", False, _by_rank({64: {"slow": 2.0}})),
    Case("6", "nothing learns", False, _by_rank(**NOTHING)),
    Case("8", "all the same", True, _by_rank(), reported=True),
    Case("8", "rank 1 a tenth of the gain behind (the margin)", False, _short(1, 0.1)),
    Case("8", "rank 4 a fifth of the gain behind", False, _short(4, 0.2)),
    Case("8", "nothing learns", False, _by_rank(**NOTHING)),
    Case("9", "the rule's rate", True, _by_rank(), reported=True),
    Case("9", "twice the rule's (the margin)", False, _by_rank(rule=BEST - math.log10(2))),
    Case("9", "half the rule's (the margin)", False, _by_rank(rule=BEST + math.log10(2))),
    Case("9", "every rate as good", False, _by_rank(**FLAT)),
]
