from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from matplotlib.image import imread

from analysis.data.tables import Tables
from analysis.experiment import Experiment
from analysis.report import content, details, markup, tables
from analysis.report import write as report
from harness.core.errors import UserError
from harness.records.run_dir import Status
from tests.unit.analysis import worlds
from tests.unit.analysis.figures.made import made
from tests.unit.analysis.simulation import Arm, World
from tests.unit.analysis.synthetic import (
    Sweep,
    Trial,
    example,
    params,
    rewrite_manifest,
    write_report,
    write_run,
    write_sweep,
)

HOSTILE = (
    "<script>document.title = 'ran'</script><img src=http://example.com/x.png> | "
    "``` ![x](http://example.com/y) 7"
)


class Page(HTMLParser):
    """Tags, loaded addresses and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [
            str(value)
            for name, value in attrs
            if name in ("src", "href", "srcset", "action", "data")
        ]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(sweep_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the example sweep's report."""
    return write_report(sweep_dir, tmp_path_factory.mktemp("report")).path.parent


@pytest.fixture(scope="module")
def html(written: Path) -> Page:
    return Page((written / "index.html").read_text())


def test_the_page_starts_with_the_answer(html: Page) -> None:
    order = [
        "Of 4 configurations, rank 8, alpha 32, learning rate 1e-3, target modules all-linear won",
        "How sure",
        "Next experiment",
        "Run the winner again",
        "python -m harness.run",
        "Which rank?",
        "Score against learning rate",
        "Learning curves",
        "Every trial, whatever its status",
        "The same problems, before and after",
        "Configurations, best first",
        "Learning rates: too low, good, too high",
        "More figures",
        "How this was computed",
        "Provenance",
    ]
    body = html.text[html.text.index(order[0]) :]  # after the table of contents
    positions = [body.index(text) for text in order]
    assert positions == sorted(positions)


def test_only_the_main_sections_are_unfolded(
    written: Path,
) -> None:
    text = (written / "index.html").read_text()
    folded = re.findall(
        r'<section id="([^"]+)" class="folded">\n<details id="([^"]+)" class="fold">', text
    )
    assert [section for section, _ in folded] == [
        "problems",
        "configurations",
        "rates",
        "more-figures",
        "method",
        "provenance",
    ]
    assert all(fold == f"{section}-fold" for section, fold in folded), (
        "a live page keeps open what has an id"
    )
    assert re.findall(r'<section id="([^"]+)"(?! class="folded")', text) == [
        "answer",
        "decisions",
        "figures",
        "trials",
    ]
    front = text[text.index('<section id="figures">') : text.index('<section id="trials">')]
    assert re.findall(r'<h3 id="([^"]+)">', front) == ["figure-lr_basin", "figure-learning_curves"]
    assert all(f'<a href="#{section}">' in text for section, _ in folded)
    assert "<details open" not in text


def test_claims_are_shown_only_where_they_can_be_judged(written: Path) -> None:
    text = (written / "index.html").read_text()
    assert 'id="claims"' not in text
    assert (
        text.count("None of the 13 claims of LoRA Without Regret can be judged by these runs") == 1
    )
    page = content.single(
        worlds.experiment(World((Arm(1), Arm(8)), seeds=3, rates=4, failures=0.0))
    )
    beside: dict[str, Any] = {"figures": [], "refresh": None, "downloads": [], "redraw": ""}
    judged = markup.fill("report.html.j2", {**page, **beside})
    assert '<section id="claims" class="folded">' in judged
    assert re.search(r'claim by claim</h2>\n <span class="inside">.*\d+ cannot tell</span>', judged)
    assert "can be judged by these runs" not in judged


def test_the_page_loads_nothing_and_runs_nothing(html: Page) -> None:
    assert html.loads
    beside = {path for path, _ in report.DOWNLOADS}
    assert all(address.startswith(("data:", "#")) or address in beside for address in html.loads)
    assert html.tags.count("script") == 1, "the page's own, which its policy names by its hash"
    assert not {"iframe", "object", "form", "base"} & set(html.tags)
    assert "link" in html.tags, "an empty icon, or a browser asks for /favicon.ico"


def test_every_picture_has_words(written: Path) -> None:
    text = (written / "index.html").read_text()
    pictures = re.findall(r"<img [^>]*>", text)
    assert len(pictures) > 3
    assert all(re.search(r'alt="[^"]{40,}"', picture) for picture in pictures)


def test_markdown_has_the_same_text_and_its_pictures_exist(written: Path, html: Page) -> None:
    text = (written / "report.md").read_text()
    assert (
        "**Of 4 configurations, rank 8, alpha 32, learning rate 1e-3, target modules all-linear won"
        in text
    )
    names = re.findall(r"\]\((figures/[^)]+\.png)\)", text)
    assert len(names) == 2, "short: for a pull request"
    drawn = sorted((written / "figures").iterdir())
    assert len(drawn) > 3
    for name in drawn:
        assert imread(name).std() > 0.03, f"nothing is drawn: {name.name}"
    for heading in re.findall(r"^## (.+)$", text, flags=re.MULTILINE):
        assert heading in html.text


def test_markdown_tables_are_whole(written: Path) -> None:
    blocks = re.findall(
        r"(?:^\|.*\|$\n?)+", (written / "report.md").read_text(), flags=re.MULTILINE
    )
    assert len(blocks) == 2, "decisions, configurations"
    for block in blocks:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().splitlines()}
        assert len(widths) == 1


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a report by its name."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.slow
def test_equal_directories_give_equal_reports(
    sweep_dir: Path, written: Path, tmp_path: Path
) -> None:
    write_report(sweep_dir, tmp_path)
    assert read_files(tmp_path) == read_files(written)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_tables_give_the_same_report(written: Path, tmp_path: Path, processes: int) -> None:
    assert {"index.html", "trials.csv", "tables/runs.parquet", "tables/sources.parquet"} <= set(
        read_files(written)
    )
    write_report(written / "tables", tmp_path, processes=processes)
    assert read_files(tmp_path) == read_files(written)


def test_figures_are_drawn_without_dates_or_random_names(written: Path) -> None:
    page = (written / "index.html").read_text()
    drawn = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)
    assert len(drawn) >= 16
    for svg in map(base64.b64decode, drawn):
        assert b"<dc:date>" not in svg
        assert b"<dc:creator>" not in svg


def test_tables_keep_only_the_text_that_the_page_shows(written: Path) -> None:
    samples = Tables.read(written / "tables").samples
    texts = samples.groupby("run_dir")["completion"].count()
    assert texts[texts > 0].index.tolist() == ["trials/0004"]
    assert set(samples["phase"]) == {"eval"}
    assert samples["run_dir"].nunique() == 12
    assert samples["reward"].notna().all()


def test_model_output_stays_text(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9, completion=HOSTILE))
    folder = write_report(path).path.parent
    assert folder == path / "report"
    html = Page((folder / "index.html").read_text())
    assert HOSTILE in html.text
    assert html.tags.count("script") == 1
    assert "http" not in " ".join(html.loads)


def test_a_hostile_reason_stays_in_one_cell(tmp_path: Path) -> None:
    trials = [
        Trial(0, 0, params(8, 1e-3), 0.9, Status.FAILED, HOSTILE),
        Trial(1, 0, params(1, 1e-3), 0.9),
    ]
    folder = write_report(write_sweep(tmp_path, Sweep(trials, seeds=[0]))).path.parent
    html = Page((folder / "index.html").read_text())
    assert HOSTILE in html.text
    assert html.tags.count("script") == 1
    markdown = (folder / "report.md").read_text()
    assert "<script>" not in markdown.replace("\\<script>", "")


def test_all_trials_are_listed_with_how_they_ended(experiment: Experiment) -> None:
    table = tables.trials([experiment])
    titles = [column.title for column in table.columns]
    assert titles == [
        "trial",
        "held-out accuracy",
        "rank",
        "learning rate",
        "target modules",
        "seed",
        "best (step)",
        "steps",
        "time",
        "status",
    ]
    assert len(table.rows) == 12
    assert [row.cells[0] for row in table.rows if row.best] == ["4"]
    assert [row.cells[0] for row in table.rows if row.muted] == ["9", "10", "11"]
    failed = dict(zip(titles, table.rows[10].cells, strict=True))
    assert failed["held-out accuracy"] == "(0.990)"
    assert failed["status"] == "failed: 3 non-finite gradient norms in a row at step 20"
    assert dict(zip(titles, table.rows[9].cells, strict=True))["time"] == "–"
    keys = dict(zip(titles, table.rows[4].sort, strict=True))
    assert (keys["learning rate"], keys["time"], keys["target modules"]) == (
        1e-3,
        61.5,
        "all-linear",
    )
    assert dict(zip(titles, table.rows[9].sort, strict=True))["time"] is None
    assert table.rows[10].status == "FAILED"
    assert table.rows[4].number == 4
    assert str(table.rows[4].command).startswith("python -m harness.run ")


def test_common_settings_are_listed_once() -> None:
    trials = [{"rank": rank, "score": 0.5, "step": 32} for rank in (1, 8)]
    table = tables.trials([made(trials)])
    assert table.same == "seed 0 and steps 32"
    assert not {"seed", "steps"} & {column.title for column in table.columns}
    assert (
        {len(row.cells) for row in table.rows}
        == {len(row.sort) for row in table.rows}
        == {len(table.columns)}
    )
    assert (
        tables.trials([made([*trials, {"rank": 64, "score": 0.5, "seed": 1, "step": 8}])]).same
        == ""
    )


def test_settings_swept_by_some_experiments_are_listed_together() -> None:
    first = made([{"rank": rank, "score": 0.5, "alpha": rank * 4.0} for rank in (1, 8)])
    second = made([{"rank": rank, "score": 0.5} for rank in (1, 8)])
    table = tables.trials([first, second])
    titles = [column.title for column in table.columns]
    assert titles[:5] == ["sweep", "trial", "held-out accuracy", "rank", "other settings"]
    assert [row.cells[4] for row in table.rows] == ["alpha 4", "alpha 32", "alpha 32", "alpha 32"]


def test_configurations_are_ranked_or_say_why_not(experiment: Experiment) -> None:
    table = tables.configurations(experiment)
    ranks = [row.cells[0] for row in table.rows]
    assert ranks == ["1", "2", "3", "4", "–", "–"]
    assert table.rows[0].best
    assert table.rows[0].cells[-1] == "2 of 2"
    assert [row.cells[-1] for row in table.rows[4:]] == [
        "1 of 2: 1 complete, 1 running",
        "0 of 2: 1 failed, 1 pruned",
    ]


def test_a_long_reason_is_cut_on_the_page(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9, Status.FAILED, "x" * 5000))
    status = tables.trials([Experiment.open(path)]).rows[0].cells[-1]
    assert len(status) < 400
    assert status.endswith("…")


def test_samples_are_the_same_problems_before_and_after(experiment: Experiment) -> None:
    problems, note = details.problems(experiment, "trials/0004")
    assert len(problems) == 8
    assert note.startswith("Of 8 held-out problems kept of both, training gained 8 and lost 0")
    first = problems[0]
    assert (first.index, first.differ) == (0, True)
    assert first.question.startswith("Ann has 3 apples")
    assert first.truth == "7"
    assert [answer.who for answer in first.answers] == [
        "base model, step 0",
        "after training, step 50",
    ]
    assert [answer.reward for answer in first.answers] == ["0", "1"]


def test_a_long_completion_is_cut_and_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9, completion="7 " * 4000))
    shown = details.problems(Experiment.open(path), ".")[0][0].answers[1].completion
    assert shown.endswith(" … (cut: 6500 more characters)")


def test_problems_answered_differently_come_first(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    file = path / "samples" / "step_000050.parquet"
    rows = pd.read_parquet(file)
    rows.loc[(rows["phase"] == "eval") & (rows["index"] != 5), "reward"] = 0.0
    rows.to_parquet(file)
    problems, note = details.problems(Experiment.open(path), ".")
    assert [problem.index for problem in problems] == [5, 0, 1, 2, 3, 4, 6, 7]
    assert [problem.differ for problem in problems] == [True] + [False] * 7
    assert "gained 1 and lost 0. The other 7 have equal rewards" in note


def test_a_run_without_samples_has_no_such_section(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    for file in (path / "samples").iterdir():
        file.unlink()
    assert "before and after" not in write_report(path).path.read_text()


def test_provenance_has_what_it_takes_to_do_it_again(experiment: Experiment) -> None:
    facts = dict(details.provenance(experiment))
    assert facts["command"].startswith("python -m harness.sweep ")
    assert facts["seeds"] == "0, 1"
    assert re.search(r"\(sha256:[0-9a-f]{64}\)", facts["data"])
    assert "numpy " in facts["packages"]


def test_a_manifest_with_only_a_status_has_a_page(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    (path / "manifest.json").write_text('{"status": "COMPLETE", "kind": "run"}')
    assert "reached held-out accuracy 0.900" in write_report(path).answer


@pytest.mark.parametrize(
    ("sweep", "answer"),
    [
        (
            Sweep([], status=Status.RUNNING),
            "No winner yet: no configuration has all its 2 seeds complete.",
        ),
        (
            Sweep([Trial(0, 0, params(8, 1e-3), 0.5, Status.FAILED, "boom")], seeds=[0]),
            "No winner: no trial has completed.",
        ),
        (
            Sweep([Trial(0, 0, params(8, 1e-3), 0.5, Status.CREATED)], seeds=[0]),
            "No winner: no trial has completed.",
        ),
        (
            Sweep([Trial(0, 0, params(8, 1e-3), 0.5)], seeds=[0]),
            "Only one configuration is complete: rank 8,",
        ),
    ],
    ids=["no trial", "one failed", "one created", "one trial"],
)
def test_small_sweeps_have_a_page(tmp_path: Path, sweep: Sweep, answer: str) -> None:
    made = write_report(write_sweep(tmp_path, sweep))
    assert made.answer.startswith(answer)
    assert made.path.is_file()


def test_a_sweep_with_many_damaged_files_has_a_page(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, example())
    (path / "trials" / "0000" / "manifest.json").write_text("{")
    (path / "trials" / "0001" / "metrics.jsonl").write_text("garbage\n")
    (path / "trials" / "0002" / "recipe.yaml").unlink()
    rewrite_manifest(path, git=None, hardware=None, packages=None)
    made = write_report(path)
    assert "rank 8, alpha 32, learning rate 1e-3, target modules all-linear won" in made.answer
    assert "unreadable the manifest is damaged" in Page(made.path.read_text()).text


def test_a_directory_that_is_neither_run_nor_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path)


@pytest.mark.slow
def test_five_hundred_trials_of_every_status_have_one_page(tmp_path: Path) -> None:
    fates = ["COMPLETE"] * 7 + ["FAILED", "PRUNED", "UNREADABLE"]
    trials = [
        {
            "rank": 2 ** (i % 4),
            "lr": 10 ** (-4 + (i // 4) % 62 / 25),
            "seed": i // 250,
            "status": fates[i % 10],
            "score": 0.3 + 0.6 * (i % 62) / 62 if i % 10 < 7 else None,
            "reason": None if i % 10 < 7 else "gone",
        }
        for i in range(500)
    ]
    page = report.write([made(trials)], tmp_path).path
    html = Page(page.read_text())
    assert html.text.count("python -m harness.run") >= 500
    assert "500 trials: 350 complete, 50 pruned, 50 failed and 50 unreadable." in html.text
    assert len(pd.read_csv(tmp_path / "trials.csv")) == 500


@pytest.mark.parametrize(
    ("maximize", "metric", "wins"), [(True, "eval/accuracy", 64), (False, "loss", 1)]
)
def test_best_is_highest_for_accuracy_and_lowest_for_loss(
    tmp_path: Path, maximize: bool, metric: str, wins: int
) -> None:
    trials = [
        {
            "rank": rank,
            "seed": seed,
            "score": 0.4 + index / 10 + seed / 500,
            "base": 0.3 if maximize else 0.9,
        }
        for index, rank in enumerate((1, 8, 64))
        for seed in range(3)
    ]
    made_of = report.write([made(trials, metric=metric, maximize=maximize)], tmp_path)
    assert made_of.answer.startswith(f"Of 3 configurations, rank {wins}")
    rank = next(
        line
        for line in (tmp_path / "report.md").read_text().splitlines()
        if line.startswith("| Which rank?")
    )
    assert rank.split(" | ")[1:3] == [str(wins), "best"]


def test_a_page_reports_a_damaged_manifest(tmp_path: Path) -> None:
    path = write_run(tmp_path, Trial(0, 0, params(8, 1e-3), 0.9))
    (path / "manifest.json").write_text(
        '{"status": "COMPLETE", "status_history": [{"status": "RUNNING"}]}'
    )
    assert write_report(path).answer.startswith(
        "This run is UNREADABLE (manifest: status_history holds"
    )
