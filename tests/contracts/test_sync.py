"""Test what every registered sync must do with every engine.

Failing syncs must be detected.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from harness.config.schema import Backend, SyncMode
from harness.core.errors import UserError
from rltrain.engines.base import Engine, Sample, SyncError
from rltrain.sync.check import check_sync
from rltrain.sync.disk import write_adapter
from rltrain.sync.merge import merged_weights
from rltrain.sync.registry import SYNCS, build_sync
from tests.contracts.tiny import (
    KINDS,
    Kind,
    adapt,
    flat_logprobs,
    load_base,
    marks_of,
    name_of,
    next_token_logits,
    prompt,
    ray_for_two,
    request,
    shake,
    start,
    tokens,
    trainer_logprobs,
)

MEMBER = "all_linear"
TOLERANCE = 1e-4


@dataclass
class Snapshot:
    """Samples of an engine, and their log-probabilities `[N]` at that time.

    `engine` are the engine's, `on` and `off` the trainer's with and without the adapter.
    """

    samples: list[list[Sample]]
    engine: torch.Tensor
    on: torch.Tensor
    off: torch.Tensor


@dataclass
class History:
    """What an engine sampled after each sync of an adapter's versions."""

    shares_weights: bool
    first: Snapshot
    ignored: Snapshot
    second: Snapshot
    stale: Snapshot
    zeroed: Snapshot
    trainer_before: dict[str, torch.Tensor]
    trainer_after: dict[str, torch.Tensor]


def _record_history(engine: Engine, model: PeftModel, mode: SyncMode, root: Path) -> History:
    merged = mode is SyncMode.merge
    sync = build_sync(mode, root)
    served_as = None if merged and not engine.shares_weights else MEMBER
    requests = [request(length, served_as, n=3, seed=length) for length in (1, 9, 40, 70)]

    def snapshot() -> Snapshot:
        samples = engine.generate(requests)
        on, off = (trainer_logprobs(model, member, requests, samples) for member in (MEMBER, None))
        return Snapshot(samples, flat_logprobs(samples), on, off)

    def state() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    before = state()
    sync.publish(engine, model, MEMBER, 1)
    after = state()
    first = snapshot()
    shake(model, MEMBER, seed=3)
    sync.publish(IgnoringEngine(engine), model, MEMBER, 2)  # type: ignore[arg-type]
    ignored = snapshot()
    sync.publish(engine, model, MEMBER, 3)
    second = snapshot()
    trained = state()
    model.load_state_dict(before)
    sync.publish(engine, model, MEMBER, 4)
    model.load_state_dict(trained)
    stale = snapshot()
    model.load_state_dict(
        {name: tensor * ("lora_B" not in name) for name, tensor in trained.items()}
    )
    sync.publish(engine, model, MEMBER, 5)
    model.load_state_dict(trained)
    zeroed = snapshot()
    return History(engine.shares_weights, first, ignored, second, stale, zeroed, before, after)


class IgnoringEngine:
    """Engine that silently ignores new adapters and weights."""

    def __init__(self, engine: Engine) -> None:
        self.shares_weights = engine.shares_weights

    def load_adapter(self, *args: object) -> None:
        """Do nothing."""

    def load_adapter_tensors(self, *args: object) -> None:
        """Do nothing."""

    def load_weights(self, weights: Iterable[object]) -> None:
        """Iterate over the weights and do nothing."""
        list(weights)


class Histories:
    """All histories, each recorded once, and the engine of the latest.

    Engines are slow to start.
    """

    def __init__(self, base_dir: Path, root: Path) -> None:
        self._base_dir = base_dir
        self._root = root
        self._recorded: dict[tuple[Kind, SyncMode], History] = {}
        self._up: tuple[Kind, int] | None = None
        self._engine: Engine | None = None
        self._ray = contextlib.ExitStack()

    def get(self, kind: Kind, mode: SyncMode) -> History:
        """Return the history of a kind of engine and a sync."""
        if (kind, mode) not in self._recorded:
            model = adapt(load_base(self._base_dir), [MEMBER])
            engine = self._started(kind, model, 0 if mode is SyncMode.merge else 4)
            self._recorded[kind, mode] = _record_history(
                engine, model, mode, self._root / name_of(kind) / mode.name
            )
        return self._recorded[kind, mode]

    def _started(self, kind: Kind, model: PeftModel, max_lora_rank: int) -> Engine:
        if self._up != (kind, max_lora_rank) or self._engine is None:
            self.close()
            tensor_parallel_size = 1
            if kind == "remote":
                tensor_parallel_size = 2
                self._ray.enter_context(ray_for_two())
            self._engine = start(
                kind,
                model,
                self._base_dir,
                max_lora_rank=max_lora_rank,
                tensor_parallel_size=tensor_parallel_size,
            )
            self._up = kind, max_lora_rank
        self._engine.use_model(model)
        return self._engine

    def close(self) -> None:
        """Close the open engine."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None
        self._ray.close()


@pytest.fixture(scope="module")
def histories(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Histories]:
    histories = Histories(base_dir, tmp_path_factory.mktemp("sync"))
    yield histories
    histories.close()


PAIRS = [
    pytest.param((kind, mode), id=f"{name_of(kind)}-{mode.name}", marks=marks_of(kind))
    for kind, mode in itertools.product(KINDS, SYNCS)
]
ALL_KINDS = [pytest.param(kind, id=name_of(kind), marks=marks_of(kind)) for kind in KINDS]


@pytest.fixture(params=PAIRS)
def history(request: pytest.FixtureRequest, histories: Histories) -> History:
    return histories.get(*request.param)


def test_every_mode_of_the_schema_has_a_sync() -> None:
    assert set(SYNCS) == set(SyncMode)


def test_a_published_adapter_is_served(history: History) -> None:
    for snapshot in (history.first, history.second):
        gap = check_sync(snapshot.engine, snapshot.on, snapshot.off, tolerance=TOLERANCE)
        assert gap.engine <= gap.largest <= 1e-3
        assert gap.adapter is not None
        assert gap.adapter > 0.05
        with pytest.raises(SyncError, match="serves the base model"):
            check_sync(snapshot.off, snapshot.on, snapshot.off, tolerance=TOLERANCE)


def test_a_new_version_changes_the_rollouts(history: History) -> None:
    assert tokens(history.second.samples) != tokens(history.first.samples)


@pytest.mark.parametrize("sabotage", ["ignored", "stale"])
def test_an_engine_with_the_previous_version_is_detected(history: History, sabotage: str) -> None:
    snapshot = getattr(history, sabotage)
    if history.shares_weights:
        check_sync(snapshot.engine, snapshot.on, snapshot.off, tolerance=TOLERANCE)
    else:
        assert tokens(snapshot.samples) == tokens(history.first.samples)
        with pytest.raises(SyncError):
            check_sync(snapshot.engine, snapshot.on, snapshot.off, tolerance=TOLERANCE)


def test_an_adapter_that_arrives_as_zeros_is_detected(history: History) -> None:
    snapshot = history.zeroed
    if history.shares_weights:
        check_sync(snapshot.engine, snapshot.on, snapshot.off, tolerance=TOLERANCE)
    else:
        assert torch.allclose(snapshot.engine, snapshot.off, atol=1e-4)
        with pytest.raises(SyncError, match="serves the base model"):
            check_sync(snapshot.engine, snapshot.on, snapshot.off, tolerance=TOLERANCE)


def test_publishing_does_not_change_the_trainers_weights(history: History) -> None:
    assert history.trainer_before.keys() == history.trainer_after.keys()
    assert all(
        torch.equal(tensor, history.trainer_after[name])
        for name, tensor in history.trainer_before.items()
    )


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_all_modes_give_the_same_rollouts(histories: Histories, kind: Kind) -> None:
    for one, other in itertools.pairwise(histories.get(kind, mode) for mode in SYNCS):
        for name in ("first", "second", "stale", "zeroed"):
            left, right = getattr(one, name), getattr(other, name)
            assert tokens(left.samples) == tokens(right.samples)
            assert torch.allclose(left.engine, right.engine, atol=1e-4)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_disk_and_memory_agree_to_the_bit(histories: Histories, kind: Kind) -> None:
    disk, memory = histories.get(kind, SyncMode.disk), histories.get(kind, SyncMode.memory)
    for name in ("first", "second", "stale", "zeroed"):
        assert getattr(disk, name).samples == getattr(memory, name).samples


def test_full_fine_tuning_is_served(base_dir: Path, tmp_path: Path) -> None:
    model = load_base(base_dir)
    engine = start(Backend.vllm, model, base_dir, max_lora_rank=0)
    requests = [request(length, None, n=2, seed=length) for length in (5, 50)]
    torch.manual_seed(4)
    rollouts = []
    try:
        for version in (1, 2):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
            build_sync(SyncMode.merge, tmp_path).publish(engine, model, MEMBER, version)
            samples = engine.generate(requests)
            on = trainer_logprobs(model, None, requests, samples)
            check_sync(flat_logprobs(samples), on, None, tolerance=TOLERANCE)
            rollouts.append(tokens(samples))
    finally:
        engine.close()
    assert rollouts[0] != rollouts[1]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_one_module_of_a_tied_pair_is_not_merged(base_dir: Path, target: str) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", target])
    model = get_peft_model(load_base(base_dir), config, adapter_name=MEMBER)
    with pytest.raises(UserError, match=f"got: +.*{target}"):
        next(merged_weights(model, MEMBER))


def test_merged_weights_equal_pefts_merge(base_dir: Path) -> None:
    model = adapt(load_base(base_dir))
    merged = {name: tensor.clone() for name, tensor in merged_weights(model, "attention")}
    model.set_adapter("attention")
    expected = model.merge_and_unload(adapter_names=["attention"]).state_dict()
    # The head is tied to the embedding.
    assert expected.keys() - merged.keys() == {"lm_head.weight"}
    assert not merged.keys() - expected.keys()
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in merged.items())


def test_disk_sync_keeps_one_version_in_peft_format(base_dir: Path, tmp_path: Path) -> None:
    class Recorder:
        shares_weights = False
        loaded: tuple[tuple[str, int, str], ...] = ()

        def load_adapter(self, member: str, version: int, path: Path) -> None:
            assert (path / "adapter_model.safetensors").is_file()
            self.loaded += ((member, version, str(path.relative_to(tmp_path))),)

    engine, model = Recorder(), adapt(load_base(base_dir))
    sync = build_sync(SyncMode.disk, tmp_path)
    for version in (11, 12):
        for member in ("all_linear", "attention"):
            sync.publish(engine, model, member, version)  # type: ignore[arg-type]
    assert engine.loaded[2:] == (
        ("all_linear", 12, "all_linear/v000012"),
        ("attention", 12, "attention/v000012"),
    )
    assert sorted(
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()
    ) == [
        f"{member}/v000012/{file}"
        for member in ("all_linear", "attention")
        for file in ("adapter_config.json", "adapter_model.safetensors")
    ]


def test_a_written_adapter_loads_in_plain_peft(base_dir: Path, tmp_path: Path) -> None:
    model = adapt(load_base(base_dir))
    for member in ("all_linear", "attention"):
        write_adapter(model, member, tmp_path / member)
        plain = PeftModel.from_pretrained(load_base(base_dir), tmp_path / member).eval()
        loaded, expected = (
            next_token_logits(plain, "default", prompt(9)),
            next_token_logits(model, member, prompt(9)),
        )
        assert torch.equal(loaded, expected)


def test_an_old_adapter_is_replaced_as_a_whole(base_dir: Path, tmp_path: Path) -> None:
    model = adapt(load_base(base_dir))
    folder = tmp_path / "best"
    write_adapter(model, "attention", folder)
    (folder / "left_over.txt").write_text("old")
    write_adapter(model, "all_linear", folder)
    names = ["SHA256SUMS", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert len(load_file(folder / "adapter_model.safetensors")) == 2 * 7 * 2
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_write_that_fails_leaves_the_old_adapter(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapt(load_base(base_dir))
    folder = tmp_path / "best"
    write_adapter(model, "attention", folder)
    old = (folder / "adapter_config.json").read_text()
    monkeypatch.setattr("rltrain.sync.disk.json.dumps", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_adapter(model, "all_linear", folder)
    assert (folder / "adapter_config.json").read_text() == old
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize(
    ("targets", "excluded", "modules"),
    [
        (r".*\.layers\.1\..*(q_proj|down_proj)", None, 2),
        (
            ["v_proj", "q_proj", "o_proj"],
            ["layers.0.self_attn.o_proj", "layers.1.self_attn.v_proj"],
            4,
        ),
    ],
)
def test_target_modules_are_written_unchanged(
    base_dir: Path,
    tmp_path: Path,
    targets: str | list[str],
    excluded: list[str] | None,
    modules: int,
) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        lora_alpha=3,
        use_rslora=True,
        target_modules=targets,
        exclude_modules=excluded,
    )
    model = get_peft_model(load_base(base_dir), config, adapter_name=MEMBER)
    write_adapter(model, MEMBER, tmp_path / "a")
    written = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert written["target_modules"] == (targets if isinstance(targets, str) else sorted(targets))
    assert written["exclude_modules"] == (sorted(excluded) if excluded else None)
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (2, 3, True)
    assert len(load_file(tmp_path / "a" / "adapter_model.safetensors")) == 2 * modules
    PeftModel.from_pretrained(load_base(base_dir), tmp_path / "a")


def test_check_sync_measures_mean_and_largest_differences() -> None:
    engine, on, off = (
        torch.tensor([-1.0, -2.0]),
        torch.tensor([-1.1, -2.3]),
        torch.tensor([-2.0, -3.0]),
    )
    gap = check_sync(engine, on, off, tolerance=0.25)
    assert (gap.engine, gap.largest, gap.adapter) == pytest.approx((0.2, 0.3, 0.8))
    assert check_sync(engine, on, None, tolerance=0.25).adapter is None


@pytest.mark.parametrize("off", [None, torch.tensor([-1.0, -2.0])])
def test_check_sync_refuses_a_difference_above_the_tolerance(off: torch.Tensor | None) -> None:
    with pytest.raises(SyncError, match=r"2\.00e-01 nats, tolerance 1\.00e-01"):
        check_sync(torch.tensor([-1.2, -2.2]), torch.tensor([-1.0, -2.0]), off, tolerance=0.1)


def test_check_sync_refuses_an_engine_nearer_to_the_base_within_the_tolerance() -> None:
    on, off = torch.tensor([-1.0, -1.0]), torch.tensor([-1.12, -1.12])
    check_sync(on + 0.05 * (off - on), on, off, tolerance=0.1)
    with pytest.raises(SyncError, match="serves the base model"):
        check_sync(on + 0.8 * (off - on), on, off, tolerance=0.1)


def test_check_sync_refuses_nan_and_mismatched_tokens() -> None:
    good, bad = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, torch.nan])
    for off in (None, good - 1):
        with pytest.raises(SyncError):
            check_sync(bad, good, off, tolerance=0.1)
    for engine, on, off in [
        (good, good[:1], None),
        (good, good, good[:1]),
        (good[:0], good[:0], None),
    ]:
        with pytest.raises(ValueError, match="same tokens"):
            check_sync(engine, on, off, tolerance=0.1)
