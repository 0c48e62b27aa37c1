"""How recipe keys, their values and scores read on a page."""

from __future__ import annotations

import json
import math
from typing import Any

from harness.config import metrics
from harness.core.errors import visible

RANK = "trainer.policy.model.lora.rank"
ALPHA = "trainer.policy.model.lora.alpha"
LR = "trainer.policy.optimizer_config.lr"
TARGETS = "trainer.target_modules"
# What every report names first, swept or not.
MAIN_KEYS = (RANK, ALPHA, LR, TARGETS)

_KEYS = {RANK: "rank", ALPHA: "alpha", LR: "learning rate", TARGETS: "target modules"}
_METRICS = {"eval/accuracy": "held-out accuracy", "reward": "training reward"}


def key(name: str) -> str:
    """A recipe key in words: its usual name, else its last part."""
    return _KEYS.get(name, name.rsplit(".", 1)[-1].replace("_", " "))


def metric(name: str) -> str:
    """A metric in words, else its own name."""
    return _METRICS.get(name, name)


def value(name: str, given: Any) -> str:
    """A recipe key's value for people: `3e-4` for a learning rate, `q_proj, v_proj` for a list."""
    if given is None or given != given:
        return "–"
    if name == LR or name.endswith(".lr"):
        return lr(float(given))
    if name == RANK and int(given) == 0:
        return "0 (full)"
    if isinstance(given, str) and given.startswith("["):
        given = json.loads(given)
    if isinstance(given, list):
        return ", ".join(visible(str(item)) for item in given)
    return f"{given:g}" if isinstance(given, int | float) else visible(str(given))


def setting(name: str, given: Any) -> str:
    """A key and its value in running text: `rank 8`, `full fine-tuning`, `all-linear`."""
    if name == RANK and given is not None and given == given and int(given) == 0:
        return "full fine-tuning"
    return f"{key(name)} {value(name, given)}"


def matters(name: str, values: dict[str, Any]) -> bool:
    """Whether a key has any effect beside these others: full fine-tuning has neither alpha nor
    target modules.
    """
    return not (name in (ALPHA, TARGETS) and values.get(RANK) == 0)


def settings(values: dict[str, Any]) -> str:
    """Several keys and values in running text: `rank 8, alpha 32, learning rate 3e-4`."""
    return ", ".join(
        setting(name, given) for name, given in values.items() if matters(name, values)
    )


def lr(given: float) -> str:
    """A learning rate to two digits: `3e-4`, `1.2e-3`."""
    mantissa, exponent = f"{given:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def score(name: str, given: float | None) -> str:
    """A metric's value: three decimals for a share, else four digits; an en dash where there is
    none.
    """
    if given is None or not math.isfinite(given):
        return "–"
    return f"{given:.3f}" if metrics.lookup(name).unit == "share" else f"{given:.4g}"


def signed(name: str, given: float) -> str:
    """A difference of a metric's values with its sign: `+0.012`."""
    # Plus 0.0, for what rounds to nothing has no sign.
    return (
        f"{round(given, 3) + 0.0:+.3f}"
        if metrics.lookup(name).unit == "share"
        else f"{given + 0.0:+.4g}"
    )


def listed(parts: list[str], last: str = "and") -> str:
    """Words in a row: `a, b and c`."""
    return f" {last} ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def plural(count: int, noun: str) -> str:
    """A count with its noun: `1 seed`, `3 seeds`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def capital(text: str) -> str:
    """Text with its first letter large."""
    return text[:1].upper() + text[1:]
