"""Make a model folder that the trainer can use, and check it as the trainer would."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from harness.config.schema import Backend, Device, DType, Recipe, Sampling
from harness.core.errors import UserError
from harness.core.paths import locate
from harness.records.files import remove_folder, whole_folder
from rltrain.engines.base import EngineOptions, Request, build_engine, stop_token_ids
from rltrain.models.gguf import is_gguf, read_gguf
from rltrain.models.loading import NO_CODE, cannot_load, load_base

QUESTION = "What is the capital of France?"
ENGLISH = (
    "The sun rose over the hills, and the farmer opened the gate so that the sheep could walk down "
    "to the river."
)
LONGEST_PROMPT, LONGEST_ANSWER = 160, 48
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """Facts about a prepared model, measured by its checks.

    Attributes:
        architecture: transformers' name of the model's class.
        parameters: a tied head counts once.
        dtype: of the weights on disk.
        tied: whether head and embedding share their weights.
        stop_tokens: the tokens that end a completion, as text.
        nats_per_token: mean negative log-probability of the tokens of `ENGLISH`.
        answer: the greedy answer to `QUESTION`, special tokens included.
    """

    architecture: str
    parameters: int
    dtype: str
    tied: bool
    stop_tokens: tuple[str, ...]
    nats_per_token: float
    answer: str


def prepare_model(source: str, output: Path, dtype: str | None = None) -> PreparedModel:
    """Write the model folder `output` from a GGUF file, a model folder or a hub name.

    Weights are written in `dtype`, by default as they are stored; a GGUF file's are dequantized,
    by default to float32. The stop tokens are completed by the token that ends a turn in the chat
    template. Then the folder is loaded and asked as by the trainer; where a check fails, no folder
    is left. Raises UserError for an output that exists, a source that cannot be loaded, and a model
    that cannot be trained.
    """
    if output.exists():
        raise UserError(
            "the output exists already", got=output, fix="name a folder that does not exist yet"
        )
    model, tokenizer = _load(source, _DTYPES.get(dtype or ""))
    if tokenizer.chat_template is None:
        raise UserError(
            "the model has no chat template: it is a base model, or its file lost the template",
            got=source,
            fix="use the instruction-tuned model",
        )
    stops = {*stop_token_ids(model, tokenizer), *_end_of_turn(tokenizer)}
    if not stops:
        raise UserError(
            "nothing ends a completion: the model names no end-of-sequence token, and its chat "
            "template ends no turn with a special token",
            got=source,
            fix="set eos_token_id in the model's generation_config.json",
        )
    model.generation_config.eos_token_id = sorted(stops)
    stored = str(model.dtype).removeprefix("torch.")
    ids = _conversation(tokenizer)
    with whole_folder(output, sealed=False) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    del model
    try:
        return _check(output, ids, stored)
    except BaseException:
        remove_folder(output)
        raise


def _load(source: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Any]:
    path = locate(source)
    if path is not None and path.is_file():
        if not is_gguf(path):
            raise UserError(
                "the source is no model",
                got=source,
                allowed="a GGUF file, a folder with config.json, or a hub name",
            )
        return read_gguf(path, dtype or torch.float32)
    if path is not None and (files := sorted(path.glob("*.gguf"))):
        raise UserError(
            "the source is a folder of GGUF files",
            got=source,
            fix=f"name one of them: {', '.join(str(file) for file in files)}",
        )
    place = source if path is None else str(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype or "auto", use_safetensors=True, **NO_CODE
        )
        return model, AutoTokenizer.from_pretrained(place, **NO_CODE)
    except Exception as error:  # a damaged file can raise anything
        raise cannot_load("the source", source, error) from error


def _end_of_turn(tokenizer: Any) -> set[int]:
    """Return the special token with which the chat template ends the assistant's turn, if any."""
    reply = "Hello."
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": reply}]
    tail = tokenizer.apply_chat_template(chat, tokenize=False).rpartition(reply)[2].lstrip()
    first = tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
    return set(first) & tokenizer.added_tokens_decoder.keys()


def _conversation(tokenizer: Any) -> list[int]:
    """Return the token ids of a conversation; raise UserError where they lose its text."""
    chat = [
        {"role": "user", "content": f"{QUESTION} Answer in 7 words; don't guess."},
        {"role": "assistant", "content": "The capital of France is Paris, (naïve) 100%."},
        {"role": "user", "content": "And of Italy?"},
    ]
    ids: list[int] = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    text = tokenizer.decode(ids)
    lost = [turn["content"] for turn in chat if turn["content"] not in text]
    if lost:
        raise UserError(
            "the tokenizer does not give a conversation's text back",
            got=f"{lost[0]!r} is not in {text!r}",
            fix="use the tokenizer files of the model's publisher",
        )
    return ids


def _check(folder: Path, conversation: list[int], stored: str) -> PreparedModel:
    """Load a folder as the trainer does, and ask it; raises UserError for what cannot train."""
    recipe = Recipe()
    recipe.trainer.policy.model.path = str(folder)
    if stored in DType.__members__:
        recipe.trainer.policy.model.dtype = DType[stored]
    recipe.trainer.placement.device = Device.cpu
    recipe.generator.backend = Backend.transformers
    recipe.generator.max_input_length = LONGEST_PROMPT
    sampling = Sampling(max_generate_length=LONGEST_ANSWER, temperature=0.0)
    recipe.generator.sampling_params = recipe.generator.eval_sampling_params = sampling
    model, tokenizer = load_base(recipe)
    stops = stop_token_ids(model, tokenizer)
    if _conversation(tokenizer) != conversation or not _end_of_turn(tokenizer) <= set(stops):
        raise UserError(
            "the saved tokenizer is not the one that was read",
            got=f"{len(conversation)} tokens of a conversation, {len(_conversation(tokenizer))} "
            "after saving",
            fix="use the tokenizer files of the model's publisher",
        )
    english = torch.tensor([tokenizer(ENGLISH, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        nats = float(model(input_ids=english, labels=english).loss)
    if not nats < float("inf"):
        raise UserError("the model's log-probabilities are not finite", got=f"{nats}")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    options = EngineOptions(str(folder), model.dtype, stops, max_lora_rank=0, max_loras=1)
    with contextlib.closing(build_engine(recipe, model, options)) as engine:
        ((sample,),) = engine.generate([Request(tuple(prompt), 1, 0, sampling, None)])
    head = model.get_output_embeddings()
    return PreparedModel(
        architecture=type(model).__name__,
        parameters=model.num_parameters(),
        dtype=stored,
        tied=head is not None and head.weight is model.get_input_embeddings().weight,
        stop_tokens=tuple(tokenizer.convert_ids_to_tokens(list(stops))),
        nats_per_token=nats,
        answer=tokenizer.decode(sample.token_ids),
    )
