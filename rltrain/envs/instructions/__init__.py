"""Verifiable instruction following: short answers that keep constraints a program can check.

After IFEval (Zhou et al. 2023, arXiv:2311.07911) and IF-RLVR (Pyatkin et al. 2025,
arXiv:2507.02833). Prompts ask a small model for a sentence or two about a topic, with one or two
constraints. A completion must keep them and be an answer: see `answers`. IFEval's own rows ask for
constraints alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rltrain.envs.instructions.rows import row, sample
from rltrain.envs.instructions.scoring import can_score, parse_task, reward

__all__ = ["can_score", "prepare", "reward"]

SPLIT_SIZES = {"train": 2048, "validation": 256, "test": 512}
UNSEEN_SIZE = 256


def prepare(source: Sequence[Path] | None, output_dir: Path) -> dict[str, int]:
    """Write the data files to `output_dir` and return the rows of each.

    Without a source: train, validation and test, whose topics are apart, and test_unseen, with the
    test split's topics and kinds of constraints that no other file has. With IFEval's JSONL files:
    ifeval. Raises UserError for a bad row, before anything is written.
    """
    from rltrain.data.files import write_rows

    if source:
        files = {"ifeval": _read_ifeval(source)}
    else:
        files = {split: sample(split, size) for split, size in SPLIT_SIZES.items()}
        files["test_unseen"] = sample("test", UNSEEN_SIZE, unseen=True)
    for split, rows in files.items():
        write_rows(rows, output_dir / f"{split}.parquet")
    return {split: len(rows) for split, rows in files.items()}


def _read_ifeval(paths: Sequence[Path]) -> list[dict[str, object]]:
    from harness.core.errors import UserError
    from rltrain.data.files import read_rows, require_columns

    rows: list[dict[str, object]] = []
    for path in paths:
        source_rows = read_rows(path)
        require_columns(source_rows, ("prompt", "instruction_id_list", "kwargs"), path)
        for number, source_row in enumerate(source_rows, start=1):
            where, prompt = f"{path}, row {number}", source_row["prompt"]
            try:
                task = parse_task(source_row)
            except ValueError as error:
                what, allowed = error.args
                raise UserError(
                    "a row is not one of IFEval's", got=f"{where}: {what}", allowed=allowed
                ) from None
            if not isinstance(prompt, str) or not prompt.strip():
                raise UserError("a prompt is not text", got=f"{where}: {prompt!r}")
            chat = [{"role": "user", "content": prompt}]
            rows.append(
                row(chat, task.to_ground_truth(), "ifeval", len(rows), data_source="IFEval")
            )
    return rows
