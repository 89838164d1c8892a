"""A tokenizer of 256 bytes and a few special tokens, made here, in mlx-lm's wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<user>", "<system>", "<assistant>", "<no>")
VOCABULARY = 256 + len(SPECIAL)


def backend() -> Any:
    """The tokenizer of the `tokenizers` library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer


def fast(template: str | None = TEMPLATE) -> Any:
    """The same as transformers has it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend(), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer


def wrapped(template: str | None = TEMPLATE) -> Any:
    """The same as mlx-lm's models meet it."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return TokenizerWrapper(fast(template))


def write(directory: Path, template: str | None = TEMPLATE) -> None:
    """Its files, as beside the weights of a model."""
    fast(template).save_pretrained(directory)
