"""Error rates and power of claims and decisions, on simulated sweeps of known truth."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from analysis.claims import CLAIMS
from analysis.claims.arm import BASIN_SHARE
from analysis.claims.claim import FAILS, HOLDS, RESOLVED
from analysis.claims.curves import CURVE_SHARE
from analysis.claims.rates import FACTOR, HALF_WAY
from analysis.stats.effects import GAIN_SHARE
from harness.core.paths import PROJECT
from harness.records.files import write_json, write_text
from tests.unit.analysis.choices import COLLAPSING, STABLE, Choice
from tests.unit.analysis.simulation import BASE, CASES, GAIN, NOISE, Case, World

SWEEPS, FOR_SEEDS = 1000, 500
MOST_SEEDS = 8
WORDS = Path(__file__).parent / "claims.md"
RECORD, PAGE = PROJECT / "docs" / "benchmarks" / "claims.json", PROJECT / "docs" / "claims.md"
OTHER_WORLDS: dict[str, dict[str, Any]] = {
    "cliff-edged basins": {"shape": "cliff"},
    "rates a factor 2.5 apart": {"step": 0.4, "rates": 7},
    f"seed noise {2 * NOISE:g}": {"noise": 2 * NOISE},
    "5 seeds": {"seeds": 5},
}
KINDS = ("wrong best", "wrong worse", "wrong tied", "unstable best", "best", "tied", "open")
GAINS = {f"{GAIN:g}": {}, f"{GAIN / 2:g}": {"gain": GAIN / 2}}


def main() -> None:
    """Simulate, print, and write `docs/benchmarks/claims.json` and `docs/claims.md`."""
    parts = {"claims": claims, "decisions": decisions}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=parts, help="simulate it alone; the other's record stays")
    options = parser.parse_args()
    selected = [options.only] if options.only else list(parts)
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    record |= {"what": __doc__, "sweeps": SWEEPS, "sweeps_elsewhere": FOR_SEEDS}
    record |= {"cases" if name == "claims" else name: parts[name]() for name in selected}
    write_json(RECORD, record)
    write_text(PAGE, page(record))
    print(f"written: {RECORD.relative_to(PROJECT)}, {PAGE.relative_to(PROJECT)}")


def claims() -> list[dict[str, Any]]:
    """Return how often each claim's verdicts occur, by case."""
    cases = []
    for case in CASES:
        row: dict[str, Any] = {
            "claim": case.claim,
            "case": case.name,
            "true": case.true,
            "reported": case.reported,
        }
        row["shares"] = case.shares(SWEEPS)
        if not case.true:
            row["holds_elsewhere"] = {
                name: case.shares(FOR_SEEDS, seed=1, **world)[HOLDS]
                for name, world in OTHER_WORLDS.items()
            }
        if case.reported:
            row["seeds_for_80"] = {name: seeds_for_80(case, world) for name, world in GAINS.items()}
        cases.append(row)
        print(json.dumps(row), flush=True)
    return cases


def decisions() -> dict[str, dict[str, dict[str, float]]]:
    """Return how often a decision between values is wrong, by world, without and with collapses."""
    with ProcessPoolExecutor() as pool:
        result: dict[str, dict[str, dict[str, float]]] = {}
        for kind, worlds in (("stable", STABLE), ("collapsing", COLLAPSING)):
            shares = pool.map(Choice.shares, worlds, [SWEEPS] * len(worlds))
            result[kind] = {}
            for world, one in zip(worlds, shares, strict=True):
                result[kind][world.name] = one
                print(json.dumps({world.name: one}), flush=True)
        return result


def seeds_for_80(case: Case, world: dict[str, Any]) -> int | None:
    """Return the fewest seeds with which a true claim holds in four of five sweeps.

    None if 8 are too few.
    """
    result = (
        n
        for n in range(2, MOST_SEEDS + 1)
        if case.shares(FOR_SEEDS, seed=2, **world, seeds=n)[HOLDS] >= 0.8
    )
    return next(result, None)


def page(record: dict[str, Any]) -> str:
    """Return docs/claims.md: how each verdict is reached, and its error rates."""
    cases = record["cases"]
    world = World(())
    text = WORDS.read_text().format(
        gain_share=f"{GAIN_SHARE:.0%}",
        basin=f"{BASIN_SHARE:.0%}",
        factor=f"{FACTOR:g}",
        half_way=f"{HALF_WAY:g}",
        curves=f"{CURVE_SHARE:.0%}",
        resolved=f"{RESOLVED:g}",
        base=BASE,
        gain=GAIN,
        noise=NOISE,
        rates=world.rates,
        apart=f"{10**world.step:.1f}",
        failures=f"{world.failures:.0%}",
        sweeps=record["sweeps"],
        elsewhere=record["sweeps_elsewhere"],
    )
    claims = [(f"**{c.id}**", c.text, _how(c.judge), f"`{c.recipe}.yaml`") for c in CLAIMS.values()]
    text = text.replace("<claims>", _table(("claim", "statement", "judged by", "recipe"), claims))
    false = [_false(case) for case in cases if not case["true"]]
    text = text.replace(
        "<false>", _table(("claim", "the truth", "false “holds”", *OTHER_WORLDS), false)
    )
    for kind, worlds in record["decisions"].items():
        rows = [(name, *(_share(shares[one]) for one in KINDS)) for name, shares in worlds.items()]
        text = text.replace(f"<{kind}>", _table(("the truth", *KINDS), rows))
    heads = [f"seeds for 80%, gain {name}" for name in GAINS]
    true = [_true(case) for case in cases if case["true"]]
    return text.replace(
        "<true>", _table(("claim", "the truth", "“holds”", "false “does not hold”", *heads), true)
    )


def _false(case: dict[str, Any]) -> tuple[str, ...]:
    elsewhere = [_share(case["holds_elsewhere"][name]) for name in OTHER_WORLDS]
    return (case["claim"], case["case"], _share(case["shares"][HOLDS]), *elsewhere)


def _true(case: dict[str, Any]) -> tuple[str, ...]:
    seeds = [_seeds(case["seeds_for_80"][name]) if case["reported"] else "" for name in GAINS]
    return (
        case["claim"],
        case["case"],
        _share(case["shares"][HOLDS]),
        _share(case["shares"][FAILS]),
        *seeds,
    )


def _how(judge: Callable[..., Any]) -> str:
    first = " ".join((judge.__doc__ or "").split("\n\n")[0].split())
    return first.split(": ", 1)[1]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [
        " | ".join(cell.replace("|", "\\|") for cell in row)
        for row in (head, ("---",) * len(head), *rows)
    ]
    return "\n".join(f"| {line} |" for line in lines)


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _seeds(value: int | None) -> str:
    return f"more than {MOST_SEEDS}" if value is None else str(value)


if __name__ == "__main__":
    main()
