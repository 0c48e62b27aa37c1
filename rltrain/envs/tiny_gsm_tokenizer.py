"""The tiny_gsm tokenizer: Qwen2's byte-level BPE with a token for every word and digit."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from rltrain.envs import gsm8k, tiny_gsm

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

# ChatML, without a system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MAX_LENGTH = 256

_SAMPLED_PROBLEMS = 20_000


def build_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer trained on the words of a fixed sample of problems and answers.

    Its class is Qwen2's, because `AutoTokenizer` builds that for a Qwen2 model.
    """
    import json

    from tokenizers import AddedToken, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer().backend_tokenizer
    texts = ["system\n", "user\n", "assistant\n", "The answer is 1."]
    for problem in itertools.islice(tiny_gsm.problems("train", seed=0), _SAMPLED_PROBLEMS):
        texts += [problem.question, problem.solution]
    # With each word once, merging continues until every word is one token.
    pieces = sorted(
        {piece for text in texts for piece, _ in blank.pre_tokenizer.pre_tokenize_str(text)}
    )
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    splitter, blank.pre_tokenizer = blank.pre_tokenizer, pre_tokenizers.WhitespaceSplit()
    blank.train_from_iterator(pieces, trainer)
    blank.pre_tokenizer = splitter
    learnt = json.loads(blank.to_str())["model"]

    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        unk_token=None,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=MAX_LENGTH,
    )
    # The instruction of every prompt is one token, which makes rollouts cheaper.
    tokenizer.add_tokens([AddedToken(f" {gsm8k.PROMPT_SUFFIX}", normalized=False, special=False)])
    return tokenizer
