"""Compare `docs/benchmarks/*.json` with the targets.

Writes `summary.json`, and a page with figures, `README.md`.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from harness.records.files import write_json, write_text
from tests.benchmarks import figures
from tests.benchmarks.side_by_side import RESULTS, middle

Record = dict[str, Any]
SECTIONS = (
    "single_run",
    "sweep",
    "handover",
    "same_answers",
    "pack",
    "quickstart",
    "rollout",
    "update",
    "head",
    "sync",
    "checks",
    "report",
)
SAME_SCORE = 0.02  # about one standard error of 512 problems


def main() -> None:
    """Read the records; write summary, figures and page."""
    files = {name: RESULTS / f"{name}.json" for name in SECTIONS}
    records = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    judged = [
        one for name, judge in JUDGES.items() if name in records for one in judge(records[name])
    ]
    findings = [one for one in judged if one["value"] is not None]
    write_json(RESULTS / "summary.json", findings)
    drawn = {name: draw(records[name]) for name, draw in figures.FIGURES.items() if name in records}
    write_text(RESULTS / "README.md", page(records, findings, drawn))
    met = sum(bool(one["met"]) for one in findings)
    print(
        f"{met} of {sum(one['met'] is not None for one in findings)} targets met: "
        "docs/benchmarks/README.md"
    )


def finding(name: str, value: float | None, target: str | None, how: str) -> Record:
    """Return one line of the summary.

    `target` is `>= x` or `<= x`, or None for a number that is only reported.
    """
    met = None
    if target is not None and value is not None:
        sign, bound = target.split()
        met = value >= float(bound) if sign == ">=" else value <= float(bound)
    return {
        "name": name,
        "value": None if value is None else round(value, 4),
        "target": target,
        "met": met,
        "how": how,
    }


def ratio(a: float | None, b: float | None) -> float | None:
    """Return a / b, or None if one is missing."""
    return a / b if a is not None and b else None


def single_run(record: Record) -> Iterator[Record]:
    """Yield tokens a second, seconds to the same accuracy, start-up and memory of one run."""
    how = (
        f"medians of {record['rounds']} rounds by turns, fresh processes, "
        f"{record['threads']} threads; single_run.json"
    )
    for completions, target in (("512", ">= 2"), ("64", ">= 1.3")):
        rows = record["speed"].get(completions, {})
        if not {"TRL"} < rows.keys():
            continue
        ours = {name: row["tokens_per_second"] for name, row in rows.items() if name != "TRL"}
        for name, rate in ours.items():
            best = target if rate == max(ours.values()) else None
            yield finding(
                f"tokens a second at {completions} completions, {name} / TRL",
                ratio(rate, rows["TRL"]["tokens_per_second"]),
                best,
                how,
            )
        for name, row in rows.items():
            yield finding(
                f"seconds to the first step, {name}, {completions} completions",
                row["startup_s"],
                None,
                how,
            )
            yield finding(
                f"peak memory in GiB, {name}, {completions} completions",
                row["memory_gb"],
                None,
                how,
            )
    accuracy = record.get("accuracy") or {"contenders": {}}
    reached = {name: one["reached"] for name, one in accuracy["contenders"].items()}
    for threshold in reached.get("TRL", {}):
        seeds = len(accuracy["seeds"])
        both = {
            name: table[threshold]
            for name, table in reached.items()
            if table[threshold]["seeds"] == seeds
        }
        if "TRL" not in both or len(both) < 2:
            continue
        how = (
            f"median of {seeds} seeds, {accuracy['completions']} completions, without "
            "evaluation; single_run.json"
        )
        name = min(
            (one for one in both if one != "TRL"), key=lambda one: float(both[one]["seconds"])
        )
        yield finding(
            f"seconds from launch to {threshold} held-out accuracy, TRL / {name}",
            ratio(both["TRL"]["seconds"], both[name]["seconds"]),
            ">= 1",
            how,
        )


def sweep(record: Record) -> Iterator[Record]:
    """Yield makespans of whole sweeps, and scores."""
    how = (
        f"medians of {record['rounds']} rounds by turns, start-up and our report "
        "included; sweep.json"
    )
    for size, rows in record["sizes"].items():
        spans = {name: row["makespan_s"] for name, row in rows.items()}
        scores = {name: row["best_accuracy"] for name, row in rows.items()}
        theirs, packed = spans.get("TRL"), spans.get("ours, packed")
        yield finding(
            f"makespan of {size} trials, packed / TRL",
            ratio(packed, theirs),
            "<= 0.3333" if size == "8" else "<= 0.25",
            how,
        )
        yield finding(
            f"makespan of {size} trials, packed / unpacked",
            ratio(packed, spans.get("ours, unpacked")),
            "<= 0.5" if size == "8" else None,
            how,
        )
        pruned = "ours, packed and pruned"
        if pruned in spans:
            yield finding(
                f"makespan of {size} trials, packed and pruned / TRL",
                ratio(spans[pruned], theirs),
                "<= 0.125" if size == "8" else None,
                how,
            )
        if {pruned, "TRL"} <= scores.keys():
            yield finding(
                f"best score of {size} trials, pruned less TRL's",
                scores[pruned] - scores["TRL"],
                f">= {-SAME_SCORE}",
                "their best adapters, scored by one evaluation; sweep.json",
            )


def handover(record: Record) -> Iterator[Record]:
    """Yield the time until a slot is used again."""
    for name, waits in record["waits_s"].items():
        target = "<= 1" if name == "packed" else None
        yield finding(
            f"seconds from a free slot to the next trial's beginning, {name}",
            middle(waits),
            target,
            "status history of the trials; handover.json",
        )


def same_answers(record: Record) -> Iterator[Record]:
    """Yield the difference between packed and alone, next to that between seeds, and the winner."""
    for row in record["rows"]:
        which = (
            f"{row['configurations']} configurations, {row['engine']}, threads: {row['threads']}"
        )
        how = f"paired by configuration, Wilcoxon p = {row['p_wilcoxon']:g}; same_answers.json"
        yield finding(
            f"spread of packed less alone / of one seed less another, {which}",
            ratio(row["sd_of_differences"], row["sd_between_seeds"]),
            "<= 1",
            how,
        )
        yield finding(
            f"packed and alone pick the same winner, {which}",
            float(row["same_winner"]),
            ">= 1",
            how,
        )


def pack(record: Record) -> Iterator[Record]:
    """Yield the speedup next to its bound, memory, and shares of the peak."""
    for engine, table in record["engines"].items():
        last = table["rows"][-1]
        yield finding(
            f"speedup of {last['members']} members in one pack over its bound, {engine}",
            ratio(last["speedup"], last["bound"]),
            None,
            "start-up included; pack.json",
        )
        for phase in ("rollout", "update"):
            shares = {row["members"]: row[f"{phase}_share_of_peak"] for row in table["rows"]}
            yield finding(
                f"share of the matmul peak, {phase}, 1 member, {engine}",
                shares.get(1),
                None,
                "pack.json",
            )
    memory = record["memory"]
    share = ratio(memory["further_member_gb"], memory["base_gb"])
    how = (
        f"peak of {memory['members']} members less that of 1, on a base of 35 M "
        "parameters; a second base: 1; pack.json"
    )
    yield finding("memory of a further member / the base's", share, "<= 0.5", how)


def quickstart(record: Record) -> Iterator[Record]:
    """Yield the quickstart's time before packs and now."""
    now, before = (record["medians"][code]["makespan_s"] for code in ("now", "before"))
    yield finding(
        "quickstart's 8 trials, now / before",
        ratio(now, before),
        "<= 0.5",
        f"medians of {record['rounds']} rounds by turns; quickstart.json",
    )


def rollout(record: Record) -> Iterator[Record]:
    """Yield grouped LoRA operations next to vLLM's."""
    rates = {
        (row["samples"], row.get("adapters"), row["engine"]): row["tokens_per_second"]
        for row in record["rows"]
    }
    for adapters in (1, 8):
        ours, stock = (rates.get((512, adapters, way)) for way in ("vllm", "vllm stock"))
        name = (
            f"tokens a second in vLLM, 512 sequences, adapters: {adapters}, our LoRA "
            "operations / its own"
        )
        how = "medians by turns in one process; rollout.json"
        yield finding(name, ratio(ours, stock), ">= 2", how)
        bound = ratio(rates.get((512, adapters, "vllm without LoRA")), stock)
        yield finding(
            f"the same with the adapters' products left out, adapters: {adapters}", bound, None, how
        )


def sync(record: Record) -> Iterator[Record]:
    """Yield the latency of sync modes for engines that hold their own weights."""
    seconds = {
        (row["rank"], row["sync"]): row["seconds"]
        for row in record["rows"]
        if row["engine"] == "vllm"
    }
    for rank in sorted({rank for rank, _ in seconds}):
        memory, disk = seconds.get((rank, "memory")), seconds.get((rank, "disk"))
        yield finding(
            f"latency of memory sync / disk sync, vllm, rank {rank}",
            ratio(memory, disk),
            "<= 0.2",
            "sync.json",
        )


def head(record: Record) -> Iterator[Record]:
    """Yield memory and time of the log-probabilities' chunks."""
    rows = {row["contender"]: row for row in record["rows"]}
    ours, whole, autograd = (
        rows[name] for name in ("in chunks", "all rows at once", "PyTorch's autograd")
    )
    how = f"medians of {record['rounds']} rounds by turns; head.json"
    yield finding(
        "GiB above the inputs, 4,096 log-probabilities of 151,936, in chunks",
        ours["memory_gb"],
        "<= 1",
        how,
    )
    yield finding("the same, PyTorch's autograd", autograd["memory_gb"], None, how)
    yield finding(
        "seconds in chunks / with all rows at once",
        ratio(ours["pass_s"], whole["pass_s"]),
        "<= 1.15",
        how,
    )
    yield finding(
        "seconds in chunks / PyTorch's autograd",
        ratio(ours["pass_s"], autograd["pass_s"]),
        None,
        how,
    )


def checks(record: Record) -> Iterator[Record]:
    """Yield the cost of checksums, manifests, fsync and the sync check."""
    yield finding(
        "a step with all checks / without", record["ratio"], None, "median of pairs; checks.json"
    )


def report(record: Record) -> Iterator[Record]:
    """Yield the load time of a large sweep's page."""
    loaded = record["sizes"]["200"]["loaded_ms"]
    yield finding(
        "milliseconds to load the report of 200 trials",
        loaded,
        "<= 1000",
        "in Chromium; report.json",
    )


JUDGES: dict[str, Callable[[Record], Iterator[Record]]] = {
    "single_run": single_run,
    "sweep": sweep,
    "handover": handover,
    "same_answers": same_answers,
    "pack": pack,
    "quickstart": quickstart,
    "rollout": rollout,
    "head": head,
    "sync": sync,
    "checks": checks,
    "report": report,
}


def page(records: dict[str, Record], findings: list[Record], drawn: dict[str, str]) -> str:
    """Return the Markdown page: targets, then a section for each benchmark."""
    lines = [
        "# Benchmarks",
        "",
        wrapped(
            "`make bench` measures all of this again and writes this page; each script also runs "
            "alone, as `python -m tests.benchmarks.bench_NAME`. Ratios are of medians, measured "
            "in turn on one machine in one run."
        ),
        "",
        "## Targets",
        "",
        "| what | value | target | met |",
        "| --- | ---: | ---: | --- |",
    ]
    lines += [
        f"| {one['name']} | {shown(one['value'])} | {one['target'] or ''} | {MET[one['met']]} |"
        for one in findings
    ]
    for name, record in records.items():
        what = (record.get("what") or name).strip().split("\n\n")
        lines += [
            "",
            f"## {name.replace('_', ' ').capitalize()}",
            "",
            wrapped("\n".join(what)),
            "",
        ]
        if name in drawn:
            lines += [f"![{name.replace('_', ' ')}]({drawn[name]})", ""]
        lines += table(rows_of(name, record))
        if name == "sweep":
            lines += [
                "",
                "Where the seconds that are saved come from:",
                "",
                *table(savings(record)),
            ]
        load, machine = record.get("load_average", [0.0]), record["hardware"]
        where = f"{machine['cpu']}, {machine['cores']} cores, load average at the end {load[0]:.1f}"
        lines += ["", wrapped(f"{where}: [{name}.json]({name}.json).")]
    lines += ["", "[missed.md](missed.md) says which targets were missed, and why."]
    return "\n".join(lines) + "\n"


def wrapped(text: str) -> str:
    """Return a paragraph in lines of at most 100 columns."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


MET = {True: "yes", False: "**no**", None: ""}


def rows_of(name: str, record: Record) -> list[Record]:
    """Return a benchmark's numbers as rows of scalars."""
    if name == "single_run":
        return [
            {"completions": size, "contender": who, **row}
            for size, group in record["speed"].items()
            for who, row in group.items()
        ]
    if name == "sweep":
        return [
            {"trials": size, "contender": who, **with_parts(row)}
            for size, group in record["sizes"].items()
            for who, row in group.items()
        ]
    if name == "pack":
        return [
            {"engine": engine, **row}
            for engine, group in record["engines"].items()
            for row in group["rows"]
        ]
    if name == "report":
        return [{"trials": trials, **row} for trials, row in record["sizes"].items()]
    if name == "handover":
        return [
            {
                "trials": way,
                "handovers": len(waits),
                "seconds, median": middle(waits),
                "longest": max(waits),
            }
            for way, waits in record["waits_s"].items()
        ]
    if name == "checks":
        return [
            {"steps": way, "seconds per step, median": middle(each)}
            for way, each in record["seconds_per_step"].items()
        ]
    if name == "quickstart":
        return [{"code": code, **with_parts(row)} for code, row in record["medians"].items()]
    rows: list[Record] = record.get("rows", [])
    return rows


def with_parts(row: Record) -> Record:
    """Return a row with the seconds of its parts as columns."""
    return row | {f"{part}, s": seconds for part, seconds in row["parts_s"].items()}


def savings(record: Record) -> list[Record]:
    """Return the seconds saved in each part of a sweep from one contender to the next."""
    steps = [
        ("TRL", "ours, unpacked"),
        ("ours, unpacked", "ours, packed"),
        ("TRL", "ours, packed"),
        ("ours, packed", "ours, packed and pruned"),
    ]
    rows = []
    for size, contenders in record["sizes"].items():
        for before, after in (pair for pair in steps if contenders.keys() >= set(pair)):
            old, new = contenders[before], contenders[after]
            parts = dict.fromkeys([*old["parts_s"], *new["parts_s"]])
            saved = {
                p: (old["parts_s"].get(p) or 0.0) - (new["parts_s"].get(p) or 0.0) for p in parts
            }
            whole = old["makespan_s"] - new["makespan_s"]
            rows.append({"trials": size, "from": before, "to": after, "saved, s": whole, **saved})
    return rows


def table(rows: list[Record]) -> list[str]:
    """Return a Markdown table of the scalars of each row, with columns in order of appearance."""
    columns = list(
        dict.fromkeys(
            key for row in rows for key, value in row.items() if not isinstance(value, (list, dict))
        )
    )
    if not rows:
        return []
    head = [
        " | ".join(column.replace("_", " ") for column in columns),
        " | ".join("---" for _ in columns),
    ]
    body = [" | ".join(shown(row.get(column)) for column in columns) for row in rows]
    return [f"| {line} |" for line in (*head, *body)]


def shown(value: Any) -> str:
    """Return a value as text: four digits for numbers, nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
