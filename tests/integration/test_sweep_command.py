"""Run `python -m harness.sweep --dry-run` with every shipped recipe."""

from __future__ import annotations

import subprocess
import sys

from harness.core.paths import PROJECT, RECIPES

HEAVY = ("torch", "vllm", "ray", "transformers", "peft", "matplotlib")
SHIPPED = sorted(
    str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.yaml") if path.stem != "base"
)


def test_dry_runs_load_nothing_heavy() -> None:
    code = (
        "import sys; from harness.sweep import main\n"
        f"for recipe in {SHIPPED}:\n"
        "    status = main([f'recipes/{recipe}', '--dry-run'])\n"
        f"    print('heavy', [m for m in {HEAVY} if m in sys.modules], status)\n"
        "    print('----')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    outputs = done.stdout.split("----\n")
    assert len(outputs) == len(SHIPPED) + 1, done.stderr
    for recipe, one in zip(SHIPPED, outputs, strict=False):
        assert one.splitlines()[-1] == "heavy [] 0", recipe
        for part in ("space", "first trials", "cost", "trainer.policy.optimizer_config.lr"):
            assert part in one, recipe
