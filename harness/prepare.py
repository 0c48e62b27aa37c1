"""`python -m harness.prepare TASK`: make data files or a model folder for recipes to use."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness.core.cli import Parser, invocation, run_command
from harness.core.errors import UserError
from harness.core.paths import shown


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    args = _parser([word for word in argv[:1] if "." in word]).parse_args(argv)
    if args.task == "model":
        _prepare_model(args)
        return 0
    env = None if args.task == "tiny_gsm" else _environment(args.task)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            "cannot use the output folder", got=f"{args.output_dir}: {error.strerror}"
        ) from None
    if env is None:
        _prepare_tiny_gsm(args)
        return 0
    for split, count in env.prepare(args.source, args.output_dir).items():
        print(f"{args.output_dir / split}.parquet: {count:,} problems")
    return 0


def _environment(name: str) -> Any:
    """Return the environment of a name; raises UserError if it has no `prepare` function."""
    from rltrain.envs import get_env, offers

    env = get_env(name)
    if not offers(env, "prepare"):
        raise UserError(
            "the environment module prepares no data",
            got=name,
            allowed="a module with prepare(source, output_dir)",
            fix="name a data file in the recipe: docs/guides/your_task.md says which columns",
        )
    return env


def _prepare_model(args: argparse.Namespace) -> None:
    from rltrain.distributed.process import quiet_libraries

    quiet_libraries()
    from rltrain.tools.prepare_model import QUESTION, prepare_model

    model = prepare_model(args.source, args.output, args.dtype)
    print(
        f"{shown(args.output)}: {model.architecture}, {model.parameters:,} parameters in "
        f"{model.dtype}, head {'tied to the embedding' if model.tied else 'of its own'}\n"
        f"completions end with {' or '.join(model.stop_tokens)}\n"
        f"a sentence of English costs {model.nats_per_token:.2f} nats a token "
        "(pretrained models: 2 to 5)\n"
        f"{QUESTION}\n{model.answer}"
    )


def _prepare_tiny_gsm(args: argparse.Namespace) -> None:
    from rltrain.envs.tiny_gsm_pretrain import Pretraining, prepare

    settings = Pretraining(
        steps=args.steps, seed=args.seed, threads=args.threads, eval_problems=args.eval_problems
    )
    card = prepare(args.output_dir, settings)
    held_out = card["held_out"]
    print(
        f"{args.output_dir}: {card['parameters']:,} parameters, "
        f"{sum(card['rows'].values()):,} problems, "
        f"{card['minutes']} min\n"
        f"held-out accuracy, sampled at temperature 1: {held_out['accuracy']:.3f} "
        f"({held_out['accuracy_when_well_formed']:.3f} when the answer is well formed, "
        f"which {held_out['share_well_formed']:.0%} are)"
    )


def _parser(modules: list[str]) -> Parser:
    """Return the command's parser; `modules` are the user's environments, accepted as tasks too."""
    parser = Parser(
        prog=invocation("prepare"),
        description="Make data files, or a model folder, for recipes to use. "
        "MODULE is the dotted path of your own environment, if it has a prepare function.",
    )
    tasks = parser.add_subparsers(
        dest="task", required=True, metavar="{gsm8k,instructions,math,model,tiny_gsm,MODULE}"
    )

    usual = "as train.parquet and validation.parquet"
    named = "JSONL or parquet files named *train* and *test* (default: the hub)"
    data = {
        "gsm8k": (f"GSM8K {usual}", named),
        "instructions": (
            "short texts with constraints as four parquet files; or IFEval as ifeval.parquet",
            "IFEval's JSONL files (default: prompts made here)",
        ),
        "math": (f"MATH, or files of its or DeepMath's columns, {usual}", named),
    }
    for task in (*data, *modules):
        what, source = data.get(task, (f"the data of {task} {usual}", named))
        parser_of_task = tasks.add_parser(task, help=what)
        parser_of_task.add_argument("--output-dir", type=Path, required=True)
        parser_of_task.add_argument("--source", type=Path, nargs="+", metavar="FILE", help=source)

    model = tasks.add_parser("model", help="a model folder, from a GGUF file too, checked")
    model.add_argument("source", help="a GGUF file, a model folder, or a hub name owner/name")
    model.add_argument(
        "--output", type=Path, required=True, help="the folder to write; it must not exist yet"
    )
    model.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the weights written (default: as stored; of a GGUF file float32)",
    )

    tiny_gsm = tasks.add_parser(
        "tiny_gsm", help="word problems, and a tiny base model pretrained on them"
    )
    tiny_gsm.add_argument("--output-dir", type=Path, required=True)
    tiny_gsm.add_argument(
        "--steps", type=_positive, default=1500, help="optimizer steps (default: %(default)s)"
    )
    tiny_gsm.add_argument("--seed", type=int, default=0)
    tiny_gsm.add_argument(
        "--threads", type=_positive, default=2, help="CPU threads (default: %(default)s)"
    )
    tiny_gsm.add_argument(
        "--eval-problems",
        type=_positive,
        default=1024,
        help="held-out problems to measure on (default: %(default)s)",
    )
    return parser


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return value


if __name__ == "__main__":
    run_command(main)
