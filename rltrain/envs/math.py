"""Competition mathematics, scored on the last `\\boxed{}` by math-verify.

For MATH (Hendrycks et al. 2021, arXiv:2103.03874) and DeepMath-103K (He et al. 2025,
arXiv:2504.11456).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.core.errors import UserError

PROMPT_SUFFIX = "Let's think step by step and put the final answer in \\boxed{}."
LONGEST = 500
"""Characters of an answer that math-verify gets; a longer one must equal the truth as text."""
CPU_SECONDS = 5
"""CPU time of one comparison. Wall time would make rewards depend on the machine's load."""
MEMORY_BYTES = 4 << 30

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_BARE = re.compile(r"[^\s$]+")  # \boxed 5
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\\[,!;: ]|\\(?:left|right|displaystyle)(?![A-Za-z])|~|\s+")
_WORDS = re.compile(r"(?=.*[a-z]{3}|no$)[a-z]+(?:[ ,'’-]+[a-z]+)*")
_FRACTION_OF_PI = re.compile(r"\\[dt]?frac\s*\\pi(?![a-z])\s*")
_PERCENT = re.compile(r"\s*\\?%$")

_MATH, _DEEPMATH = "EleutherAI/hendrycks_math", "zwhe99/DeepMath-103K"
_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def prompt(question: str) -> list[dict[str, str]]:
    """Return the chat for a question: one user message, the question and the instruction."""
    return [{"role": "user", "content": f"{question} {PROMPT_SUFFIX}"}]


def reward(completion: str, ground_truth: str) -> float:
    """Return 1.0 if the completion's last `\\boxed{}` equals the ground truth, else 0.0.

    Answers are compared as text, then by math-verify; words (Yes, True, a name) as text only,
    ignoring case. The ground truth is an answer, or a worked solution with its `\\boxed{}`.
    """
    answer, truth = final_answer(completion), _truth(ground_truth)
    if answer is None or not truth:
        return 0.0
    if _text(answer) == _text(truth):
        return 1.0
    words = _words(truth)
    if words is not None:
        return float(_words(answer) == words)
    if _words(answer) is not None or max(len(answer), len(truth)) > LONGEST:
        return 0.0
    return float(_equal(truth, answer))


def can_score(ground_truth: str) -> bool:
    """Return whether the ground truth holds an answer."""
    return bool(_truth(ground_truth))


def _truth(ground_truth: str) -> str:
    return final_answer(ground_truth) or _one_line(ground_truth)


def final_answer(completion: str) -> str | None:
    """Return the content of the last `\\boxed{}` (or `\\fbox{}`) on one line.

    None where there is no box, or an empty or open one.
    """
    box = _BOX.match(completion, max(completion.rfind("\\boxed"), completion.rfind("\\fbox"), 0))
    if box is None:
        return None
    start = box.end()
    if completion[start : start + 1] != "{":
        bare = _BARE.match(completion, start)
        return (_one_line(bare[0]) or None) if bare else None
    depth, index = 0, start
    while index < len(completion):
        character = completion[index]
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return _one_line(completion[start + 1 : index]) or None
        index += 2 if character == "\\" else 1
    return None


def _one_line(latex: str) -> str:
    """Return LaTeX without dollar signs, a final point and line breaks."""
    return " ".join(re.sub(r"\\?\$", "", latex).split()).removesuffix(".").rstrip()


def _text(latex: str) -> str:
    """Return text that is the same for answers that look the same."""
    plain = re.sub(r"\\[dt]frac", r"\\frac", _TEXT.sub(r"\1", latex))
    return _SPACING.sub("", plain)


def _words(latex: str) -> str | None:
    """Return an answer of words in lower case; None for formulas, which `x - y` and `ab` are."""
    text = " ".join(_SPACING.sub(" ", _TEXT.sub(r"\1", latex)).split()).casefold()
    return text if _WORDS.fullmatch(text) else None


@functools.lru_cache(maxsize=1 << 14)
def _equal(truth: str, answer: str) -> bool:
    """Return whether math-verify finds two formulas equal; False where it cannot tell."""
    return _VERIFIER.equal(truth, answer)


class Verifier:
    """math-verify in a child process, started when needed and again after it died.

    Comparing short formulas can take forever (`9^{9^{9^9}}`, many integrals), in C code that no
    exception interrupts, and math-verify's own limit needs the main thread. So the process has a
    CPU timer, and the kernel ends it.
    """

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def equal(self, truth: str, answer: str) -> bool:
        """Return whether two formulas are equal; False where the comparison ends the process.

        Raises RuntimeError when the process does not start.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._close()
                self._process = _start(self._cpu_seconds)
            try:
                assert self._process.stdin is not None
                assert self._process.stdout is not None
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.write(json.dumps([truth, answer]) + "\n")
                    self._process.stdin.flush()
                reply = self._process.stdout.readline()
            except BaseException:  # an interrupt: its answer must not be read as the next one's
                self._close()
                raise
            if not reply:
                self._close()  # waits, so that the next comparison starts a new process
            return reply == "equal\n"

    def close(self) -> None:
        """End the process, if it runs."""
        with self._lock:
            self._close()

    def forget(self) -> None:
        """Reset in a forked child: the process belongs to the parent, and the lock may be held."""
        self._lock, self._process = threading.Lock(), None

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()


_VERIFIER = Verifier()
atexit.register(_VERIFIER.close)
os.register_at_fork(after_in_child=_VERIFIER.forget)


def _start(cpu_seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        # -P: with this folder on the path, this module would shadow Python's own math.
        [sys.executable, "-P", "-c", f"from {__name__} import serve; serve({cpu_seconds})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        text=True,
        process_group=0,  # a keyboard interrupt goes to the run only
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        process.kill()
        raise RuntimeError(
            f"math-verify's process ended with status {process.wait()} while it started; see above"
        )
    return process


def serve(cpu_seconds: float) -> None:
    """Run the child process: read truth and answer as JSON, write `equal` or `different`."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]

    logging.disable()
    config = [LatexExtractionConfig()]
    # The parser prints messages, which must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    print("ready", file=answers)
    os.dup2(quiet, 2)
    for limit, value in ((resource.RLIMIT_AS, MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is set already
            resource.setrlimit(limit, (value, value))

    @functools.lru_cache(maxsize=1 << 12)  # a truth is compared with many answers
    def parsed(latex: str) -> list[Any]:
        # math-verify cannot read \frac\pi2, nor a percent sign before the closing dollar.
        number, percent = _PERCENT.subn("", _FRACTION_OF_PI.sub(r"\\frac{\\pi}", latex))
        result: list[Any] = parse(f"${number}${'%' * percent}", config, parsing_timeout=None)
        return result

    for line in sys.stdin:
        truth, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # no handler: SIGPROF ends the process
        try:
            equal = verify(
                parsed(truth), parsed(answer), allow_set_relation_comp=True, timeout_seconds=None
            )
        except Exception:  # sympy can raise anything: such an answer does not score
            equal = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("equal" if equal else "different", file=answers)


def prepare(source: Sequence[Path] | None, output_dir: Path) -> dict[str, int]:
    """Write train.parquet and validation.parquet from local files, or MATH from the hub.

    Files named *train* become the train split, files named *test* the validation split; one is
    enough. A file has MATH's columns (problem, solution or answer) or DeepMath's (question,
    final_answer). Returns the rows of each split. Raises UserError for bad files, before anything
    is written.
    """
    from rltrain.data.files import split_of_file, write_rows

    rows: dict[str, list[dict[str, Any]]] = {}
    for path in source if source is not None else _download():
        split = split_of_file(path)
        rows.setdefault(split, []).extend(_read(path, split, len(rows.get(split, []))))
    for split, split_rows in rows.items():
        write_rows(split_rows, output_dir / f"{split}.parquet")
    return {split: len(split_rows) for split, split_rows in rows.items()}


def _read(path: Path, split: str, first: int) -> list[dict[str, Any]]:
    """Return a source file's rows as rows of a data file, numbered from `first`."""
    from rltrain.data.files import read_rows, require_columns

    source_rows = read_rows(path)
    in_math = "problem" in source_rows[0]
    column = "problem" if in_math else "question"
    require_columns(source_rows, (column,) if in_math else (column, "final_answer"), path)
    rows: list[dict[str, Any]] = []
    for number, source_row in enumerate(source_rows, start=1):
        truth, worked = _truth_of(source_row, in_math)
        question = source_row[column]
        if not isinstance(question, str) or not isinstance(truth, str) or not _one_line(truth):
            raise UserError(
                "a problem has no final answer",
                got=f"{path}, row {number}: {str(worked)[-60:]!r}",
                allowed="text in answer or a solution with \\boxed{...} (MATH), or text "
                "in final_answer (DeepMath)",
            )
        rows.append(
            {
                "data_source": _MATH if in_math else _DEEPMATH,
                "prompt": prompt(question),
                "env_class": "math",
                "reward_spec": {"method": "rule", "ground_truth": truth},
                "extra_info": {
                    "split": split,
                    "index": first + len(rows),
                    "answer": worked,
                    "question": question,
                },
            }
        )
    return rows


def _truth_of(row: dict[str, Any], in_math: bool) -> tuple[Any, Any]:
    """Return the final answer, and the worked solution if there is one."""
    if not in_math:
        return row["final_answer"], row["final_answer"]
    solution, answer = row.get("solution"), row.get("answer")
    if answer is None and isinstance(solution, str):
        answer = final_answer(solution)
    return answer, answer if solution is None else solution


def _download() -> list[Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    names = [
        f"{subject}/{split}-00000-of-00001.parquet"
        for split in ("train", "test")
        for subject in _SUBJECTS
    ]
    try:
        return [Path(hf_hub_download(_MATH, name, repo_type="dataset")) for name in names]
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"cannot download {_MATH} from the hub",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}",
            fix="check the network, or name local files: --source train.jsonl test.jsonl",
        ) from None
