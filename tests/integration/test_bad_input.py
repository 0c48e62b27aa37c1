"""Check that every command answers bad input with one message.

The message has what, got, allowed or fix. Nothing heavy is loaded and nothing is written.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from harness.core.paths import PROJECT
from rltrain.data.files import write_rows
from tests.unit.analysis.synthetic import Trial, example, params, write_run, write_sweep

LORA, ALGORITHM, PLACEMENT = "trainer.policy.model.lora", "trainer.algorithm", "trainer.placement"
RUN, SWEEP = ["run", "quickstart"], ["sweep", "quickstart"]
ANSWERS = "data.train_data=[HERE/answers.jsonl]"
ENVIRONMENT = "environment.env_class=tests.faults.environments"
# HERE is a folder with the files that `write_files` creates.
CASES: list[tuple[list[str], str]] = [
    # Wrong type, unknown key or name, out of range.
    ([*RUN, f"{LORA}.rank=eight"], f"{LORA}.rank cannot take this value"),
    ([*RUN, f"{LORA}.rank=8.5"], f"{LORA}.rank cannot take this value"),
    ([*RUN, f"{LORA}.rank=[8]"], f"{LORA}.rank cannot take this value"),
    ([*RUN, f"{LORA}.rank={{a:1}}"], f"{LORA}.rank"),
    ([*RUN, f"{LORA}.rank=null"], f"{LORA}.rank cannot take this value"),
    ([*RUN, f"{LORA}.rank=513"], "<= 512"),
    ([*RUN, f"{LORA}.rank=1e30"], f"{LORA}.rank"),
    ([*RUN, "seed=99999999999999999999"], "64 bits"),
    ([*RUN, "trainer.policy.optimizer_config.lr=inf"], "finite numbers"),
    ([*RUN, "trainer.policy.optimizer_config.betas=[a,b]"], "betas"),
    ([*RUN, "trainer.policy.optimizer_config.betas=[[0.9],0.9]"], "betas cannot take this value"),
    ([*RUN, "data.train_data=3"], "data.train_data cannot take this value"),
    ([*RUN, "data.train_data=[1]"], "data file not found"),
    ([*RUN, "trainer.target_modules='(q_proj'"], "no regex"),
    ([*RUN, "trainer.target_modules=attn"], "did you mean attention for attn?"),
    ([*RUN, "--dry-run", "trainer.target_modules=[q_proj,wk]"], "got:     wk"),
    ([*RUN, "trainer.policy.model.path=HERE/pickled"], "holds its weights as a pickle"),
    ([*RUN, "trainer.strategy=fsdp"], "did you mean fsdp2?"),
    ([*RUN, "trainer.policy.model.dtype=BF16"], "did you mean bfloat16?"),
    ([*RUN, f"{PLACEMENT}.device=gpu"], "did you mean cuda?"),
    ([*RUN, "trainer.logger=printer"], "allowed: a list of console, wandb, tensorboard"),
    ([*RUN, "trainer.logger=[[wandb]]"], "allowed: a list of console, wandb, tensorboard"),
    ([*RUN, "trainer.logger=[console,wandbb]"], "did you mean wandb?"),
    ([*RUN, "trainer.logger=null"], "got:     null\n  allowed: a list of console"),
    ([*RUN, "seed=1.5"], "allowed: whole numbers"),
    ([*RUN, "trainer.bf16=true"], "did you mean trainer.policy.model.dtype?"),
    ([*RUN, "trainer.policy.lr=1e-3"], "did you mean trainer.policy.optimizer_config.lr?"),
    ([*RUN, "trainer.fast=true"], "recipes/base.yaml lists every key"),
    ([*RUN, "generator.backend=sglang"], "vllm, transformers"),
    ([*RUN, f"{ALGORITHM}.advantage_estimator=ppo"], "grpo, rloo, reinforce++, gae"),
    ([*RUN, "environment.env_class=gsm9k"], "did you mean gsm8k?"),
    ([*RUN, "environment.env_class=os.path"], "has no reward"),
    ([*RUN, "environment.env_class=no.such.module"], "cannot import the environment module"),
    ([*RUN, "sweep.sampler=cmaes"], "tpe, random, grid"),
    ([*RUN, "trainer.run_name=../outside"], "not a path"),
    ([*RUN, "trainer.policy.optimizer_config.lr=-1"], "out of range"),
    ([*RUN, "data.train_data=[nowhere.parquet]"], "nowhere.parquet"),
    (["run", "recipes/quikstart.yaml"], "did you mean recipes/quickstart.yaml?"),
    (["run"], "no recipe was given"),
    ([*RUN, "--fast"], "unrecognized arguments: --fast"),
    (["run", "--resume", "recipes"], "not a run directory"),
    (["run", "--resume", "runs/x", f"{LORA}.rank=3"], "only where and how it computes may change"),
    ([*RUN, "--dry-run", "--resume", "runs/x"], "leave out one of the two"),
    (["run", "gsm8k_lora", "generator.run_engines_locally=false"], "engines on other servers"),
    ([*RUN, "trainer.run_name=a/b"], "not a path"),
    # Settings that contradict each other.
    ([*RUN, "trainer.policy_mini_batch_size=32"], "must divide"),
    ([*RUN, "trainer.critic_mini_batch_size=5"], "must divide"),
    ([*RUN, f"{LORA}.rank=400", "generator.max_lora_rank=256"], "above generator.max_lora_rank"),
    ([*RUN, f"{LORA}.rank=0", f"{LORA}.sync=disk"], f"{LORA}.sync=merge"),
    (
        [*RUN, f"{ALGORITHM}.use_kl_loss=true", f"{ALGORITHM}.kl_loss_coef=0"],
        "computes a reference for nothing",
    ),
    (
        [*RUN, f"{ALGORITHM}.use_kl_loss=true", f"{ALGORITHM}.use_kl_in_reward=true"],
        "not into both",
    ),
    ([*RUN, f"{PLACEMENT}.policy_num_gpus_per_node=2"], "each training process holds one engine"),
    (
        [
            *RUN,
            f"{PLACEMENT}.device=cuda",
            f"{PLACEMENT}.policy_num_gpus_per_node=999",
            "generator.num_inference_engines=999",
        ],
        "not enough GPUs",
    ),
    (
        [*RUN, f"{ALGORITHM}.advantage_estimator=rloo", "generator.n_samples_per_prompt=1"],
        "it needs several",
    ),
    ([*RUN, "trainer.max_prompt_length=250"], "<= 256 together"),
    ([*RUN, "seed=1", "trainer.seed=2"], "given twice"),
    # Data.
    ([*RUN, "data.train_data=[]"], "at least one file"),
    ([*RUN, "data.train_data=[HERE/empty.parquet]"], "no rows"),
    ([*RUN, "data.train_data=[HERE/garbage.parquet]"], "cannot be read as parquet"),
    ([*RUN, "data.train_data=[HERE/columns.parquet]"], "lacks the columns prompt, reward_spec"),
    ([*RUN, "data.train_data=[HERE/texts.jsonl]"], "a prompt is not a chat"),
    ([*RUN, "data.train_data=[HERE/half.jsonl]"], "not valid JSON"),
    ([*RUN, "data.train_data=[HERE/hostile.jsonl]"], "nested too deep"),
    ([*RUN, ANSWERS, "data.question_column=ask"], "lacks the column ask"),
    # Rewards, which are called once.
    ([*RUN, ANSWERS, f"{ENVIRONMENT}.raises"], "raised LookupError: no score for 2"),
    ([*RUN, ANSWERS, f"{ENVIRONMENT}.exits"], "raised SystemExit"),
    ([*RUN, ANSWERS, f"{ENVIRONMENT}.nan"], "returned nan"),
    ([*RUN, "data.train_data=[HERE/table.csv]"], "unknown kind of data file"),
    ([*RUN, "data.val_data=[HERE]"], "data file not found"),
    (
        [*RUN, "--dry-run", "trainer.train_batch_size=4096", "trainer.policy_mini_batch_size=4096"],
        "fewer problems than one batch",
    ),
    (
        [
            *SWEEP,
            "--dry-run",
            "trainer.train_batch_size=4096",
            "trainer.policy_mini_batch_size=4096",
        ],
        "fewer problems than one batch",
    ),
    (
        [*RUN, "trainer.train_batch_size=4096", "trainer.policy_mini_batch_size=4096"],
        "fewer problems than one batch",
    ),
    # Models, checkpoints and paths.
    ([*RUN, "trainer.policy.model.path=HERE"], "holds no config.json"),
    ([*RUN, "trainer.policy.model.path=HERE/model"], "config.json is damaged"),
    ([*RUN, "trainer.policy.model.path=/no/such/folder"], "names no folder"),
    ([*RUN, "trainer.resume_mode=/no/such/checkpoint"], "no whole checkpoint"),
    ([*RUN, "trainer.ckpt_path=HERE/table.csv/runs"], "cannot write the run directory"),
    ([*RUN, "trainer.ckpt_path=/proc/runs"], "cannot write the run directory"),
    ([*RUN, "trainer.ckpt_path=HERE", "trainer.run_name=one_run"], "COMPLETE already"),
    ([*RUN, "trainer.ckpt_path=HERE", "trainer.run_name=lora_sweep"], "holds a sweep"),
    ([*RUN, f"{LORA}.lora_sync_path=HERE/table.csv"], "cannot be written"),
    (["run", "--resume", "HERE/lora_sweep"], "sweep"),
    (["run", "--resume", "HERE/nowhere"], "no manifest.json"),
    (["run", "--resume", "HERE/table.csv"], "no manifest.json"),
    (["run", "--from", "HERE/nowhere"], "no manifest.json"),
    (["run", "HERE/table.csv"], "a recipe is a YAML file"),
    (["run", "HERE/list.yaml"], "a mapping of keys"),
    (["run", "HERE/latin.yaml"], "cannot compose"),
    (["run", "HERE/twice.yaml"], "duplicate key"),
    (["run", "HERE/bomb.yaml"], "too many values"),
    (["run", "HERE/deep.yaml"], "cannot compose"),
    # Sweeps.
    (
        [*SWEEP, "sweep.space={generator.max_input_length:{choices:[32,64]}}"],
        "how trials are measured",
    ),
    (
        [*SWEEP, "sweep.space={trainer.critic.optimizer_config.lr:{choices:[1e-4,1e-3]}}"],
        "has no effect here",
    ),
    ([*SWEEP, f"{LORA}.alpha='${{{LORA}.rank}}'"], f"{LORA}.alpha reads {LORA}.rank"),
    (
        [*SWEEP, "sweep.space={trainer.target_modules:{choices:[mlp,attn]}}"],
        "did you mean attention for attn?",
    ),
    ([*SWEEP, "sweep.seeds=[0,0]"], "different numbers"),
    ([*SWEEP, "sweep.seeds=[]"], "at least one"),
    ([*SWEEP, "sweep.seeds=[-1]"], "different numbers >= 0"),
    ([*SWEEP, "sweep.seeds=[a]"], "sweep.seeds"),
    ([*SWEEP, "sweep.num_trials=0"], "out of range"),
    ([*SWEEP, "sweep.sampler=grid"], "a grid needs a list of values"),
    ([*SWEEP, "sweep.metric=accuracy"], "did you mean"),
    ([*SWEEP, "sweep.metric=eval/pass@4"], "eval_n_samples_per_prompt=4"),
    ([*SWEEP, "sweep.pruner={name:midian}"], "did you mean median?"),
    ([*SWEEP, "sweep.pruner={name:[median]}"], "sweep.pruner.name cannot take this value"),
    (
        [*SWEEP, "sweep.pruner={wrapped_pruner:{name:{a:1}}}"],
        "sweep.pruner.wrapped_pruner.name cannot take this value",
    ),
    (
        [*SWEEP, "sweep.pruner=null", "sweep.pruner={name:median,n_startup:1}"],
        "takes no such argument",
    ),
    ([*SWEEP, "sweep.first_trials=[{trainer.policy.model.lora.rank:64}]"], "outside its axis"),
    ([*SWEEP, "sweep.first_trials=[{trainer.policy.model.lora.alpha:nan}]"], "finite numbers"),
    ([*SWEEP, f"sweep.space.{LORA}.rank.choices=[1,inf]"], "finite numbers"),
    ([*SWEEP, f"sweep.space.{LORA}.rank=8"], "is no axis"),
    ([*SWEEP, "trainer.ckpt_path=HERE", "trainer.run_name=lora_sweep"], "this directory exists"),
    ([*SWEEP, "trainer.ckpt_path=HERE/table.csv/runs"], "cannot write the run directory"),
    (["sweep", "--resume", "HERE/one_run"], "this is the directory of a run"),
    (["sweep", "--resume", "HERE/table.csv"], "no manifest.json"),
    # The other commands.
    (["report"], "required"),
    (["report", "HERE/nowhere"], "no manifest.json"),
    (["report", "HERE/table.csv"], "no manifest.json"),
    (["report", "HERE/broken"], "damaged"),
    (["report", "HERE/one_run", "--output", "HERE/table.csv/out"], "cannot write"),
    (
        ["prepare", "gsm8k", "--output-dir", "HERE/out", "--source", "HERE/texts.jsonl"],
        "cannot tell the split",
    ),
    (["prepare", "math", "--output-dir", "HERE/table.csv/out"], "cannot use the output folder"),
    (["prepare", "tiny_gsm", "--output-dir", "HERE/out", "--seed", "one"], "invalid int value"),
    (["export", "HERE/table.csv", "--output", "HERE/out"], "no manifest.json"),
    (["export", "HERE/one_run", "--which", "last", "--output", "HERE/out"], "invalid choice"),
    (["export", "HERE/one_run", "--output", "HERE/out"], "no final policy"),
    (["reproduce", "HERE/nowhere"], "no manifest.json"),
    (["reproduce", "HERE/lora_sweep"], "holds a sweep"),
    (["reproduce", "HERE/one_run", "--tolerance", "nan"], "0 or more"),
    (["reproduce", "HERE/one_run", "--tolerance", "much"], "invalid float value"),
    (["check", "quickstart", "--seeds", "0,0"], "different numbers"),
    (["check", "quickstart", "--seeds", "²"], "different numbers"),
    (["check", "quickstart", "expect=null"], "expect"),
    (["check", "quickstart", "expect={eval/accuracy:{min:high}}"], "must be a number"),
    (["check", "nothing"], "no such recipe"),
]
DRIVER = """
import importlib, json, sys
from harness.core.errors import UserError
for number, argv in enumerate(json.load(sys.stdin)):
    main = importlib.import_module(f'harness.{argv[0]}').main
    try:
        result = {'status': main(argv[1:])}
    except UserError as error:
        result = {'what': error.what, 'got': error.got is not None, 'allowed': error.allowed is not None,
                'fix': error.fix is not None, 'text': str(error)}
    except BaseException as error:
        result = {'raised': f'{type(error).__name__}: {error}'}
    heavy = {'torch', 'vllm', 'ray', 'transformers', 'peft'} & set(sys.modules)
    print('\\n@@', json.dumps({**result, 'heavy': sorted(heavy)}), flush=True)
"""  # noqa: E501


@dataclass(frozen=True)
class Outcome:
    """The commands' answers, case by case, and the folder's content before and after."""

    answers: list[dict[str, Any]]
    before: list[Path]
    after: list[Path]


def write_files(folder: Path) -> None:
    """Write the files that the cases name."""
    write_run(folder, Trial(0, 0, params(8, 1e-3), 0.9))
    broken = Path(shutil.copytree(write_sweep(folder, example()), folder / "broken"))
    (broken / "manifest.json").write_text("[1, 2]")
    pd.DataFrame({"prompt": [], "reward_spec": []}).to_parquet(folder / "empty.parquet")
    write_rows([{"question": "1 + 1?"}], folder / "columns.parquet")
    (folder / "garbage.parquet").write_bytes(b"PAR1 but no more")
    (folder / "texts.jsonl").write_text(
        '{"prompt": "1 + 1?", "reward_spec": {"ground_truth": "2"}}\n'
    )
    (folder / "hostile.jsonl").write_text('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    (folder / "answers.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n' * 2)
    (folder / "half.jsonl").write_text('{"prompt": [{"role": "us')
    (folder / "table.csv").write_text("prompt,answer\n")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("[]")
    (folder / "pickled").mkdir()
    (folder / "pickled" / "config.json").write_text("{}")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"PK")
    (folder / "list.yaml").write_text("- trainer\n")
    (folder / "latin.yaml").write_bytes(b"trainer: {project_name: caf\xe9}\n")
    (folder / "twice.yaml").write_text("defaults: [quickstart, _self_]\nseed: 1\nseed: 2\n")
    names = "abcdefgh"
    lines = ["a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [
        f"{one}: &{one} [{', '.join([f'*{last}'] * 9)}]" for last, one in itertools.pairwise(names)
    ]
    (folder / "bomb.yaml").write_text("\n".join(lines))
    (folder / "deep.yaml").write_text("seed: " + "[" * 3000 + "]" * 3000)


@pytest.fixture(scope="module")
def outcome(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Run all cases one after the other in one subprocess."""
    folder = tmp_path_factory.mktemp("here")
    write_files(folder)
    before = sorted(folder.rglob("*"))
    commands = [[word.replace("HERE", str(folder)) for word in words] for words, _ in CASES]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(commands),
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line[3:]) for line in done.stdout.splitlines() if line.startswith("@@ ")]
    return Outcome(answers, before, sorted(folder.rglob("*")))


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[" ".join(words)[:70] for words, _ in CASES]
)
@pytest.mark.claim("A recipe holds only values")
def test_bad_input_gives_one_message_and_loads_nothing_heavy(outcome: Outcome, number: int) -> None:
    answer, expected = outcome.answers[number], CASES[number][1]
    assert "text" in answer, answer
    assert expected in answer["text"]
    assert "Traceback" not in answer["text"]
    assert answer["got"] or answer["fix"], "what was given, or what to give"
    if CASES[number][0][0] != "export":  # the export module is light, but its package is not
        assert answer["heavy"] == []


def test_nothing_was_written(outcome: Outcome) -> None:
    new = [path for path in outcome.after if path not in outcome.before]
    assert [path.name for path in new] == ["out"], (
        "the folder that prepare was given, and nothing in it"
    )
    assert set(outcome.before) <= set(outcome.after)
