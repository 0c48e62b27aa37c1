"""Write recipe keys, their values and scores as text for people."""

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
# Every report names these first, swept or not.
MAIN_KEYS = (RANK, ALPHA, LR, TARGETS)

_KEYS = {RANK: "rank", ALPHA: "alpha", LR: "learning rate", TARGETS: "target modules"}
_METRICS = {"eval/accuracy": "held-out accuracy", "reward": "training reward"}


def key(name: str) -> str:
    """Return the usual name of a recipe key, else its last part."""
    return _KEYS.get(name, name.rsplit(".", 1)[-1].replace("_", " "))


def metric(name: str) -> str:
    """Return the usual name of a metric, else its own name."""
    return _METRICS.get(name, name)


def value(name: str, raw: Any) -> str:
    """Write a recipe key's value: `3e-4` for a learning rate, `q_proj, v_proj` for a list."""
    if raw is None or raw != raw:
        return "–"
    if name == LR or name.endswith(".lr"):
        return lr(float(raw))
    if name == RANK and int(raw) == 0:
        return "0 (full)"
    if isinstance(raw, str) and raw.startswith("["):
        raw = json.loads(raw)
    if isinstance(raw, list):
        return ", ".join(visible(str(item)) for item in raw)
    return f"{raw:g}" if isinstance(raw, int | float) else visible(str(raw))


def setting(name: str, raw: Any) -> str:
    """Write a key with its value: `rank 8`, `full fine-tuning`."""
    if name == RANK and raw is not None and raw == raw and int(raw) == 0:
        return "full fine-tuning"
    return f"{key(name)} {value(name, raw)}"


def rank(number: float) -> str:
    """Write a rank: `rank 8`, or `full fine-tuning` for 0."""
    return setting(RANK, number)


def matters(name: str, values: dict[str, Any]) -> bool:
    """Return whether a key has an effect: full fine-tuning has neither alpha nor target modules."""
    return not (name in (ALPHA, TARGETS) and values.get(RANK) == 0)


def settings(values: dict[str, Any]) -> str:
    """Write several keys with their values: `rank 8, alpha 32, learning rate 3e-4`."""
    return ", ".join(setting(name, raw) for name, raw in values.items() if matters(name, values))


def lr(rate: float) -> str:
    """Write a learning rate with two digits: `3e-4`, `1.2e-3`."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def score(name: str, number: float | None) -> str:
    """Write a metric's value: three decimals for a share, else four digits; `–` for none."""
    if number is None or not math.isfinite(number):
        return "–"
    return f"{number:.3f}" if metrics.lookup(name).unit == "share" else f"{number:.4g}"


def score_range(name: str, low: float, high: float) -> str:
    """Write two values of a metric: `0.912 to 0.955`."""
    return f"{score(name, low)} to {score(name, high)}"


def signed(name: str, number: float) -> str:
    """Write a difference of two values of a metric with its sign: `+0.012`."""
    # Adding 0.0 turns -0.0 into 0.0.
    if metrics.lookup(name).unit == "share":
        return f"{round(number, 3) + 0.0:+.3f}"
    return f"{number + 0.0:+.4g}"


def listed(parts: list[str], last: str = "and") -> str:
    """Join words: `a, b and c`."""
    return f" {last} ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def plural(count: int, noun: str) -> str:
    """Write a count with its noun: `1 seed`, `3 seeds`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def capital(text: str) -> str:
    """Return a text with its first letter in upper case."""
    return text[:1].upper() + text[1:]
