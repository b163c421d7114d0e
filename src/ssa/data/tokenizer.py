"""Tokenizers: any Hugging Face one from a folder or the hub's cache, or a byte-level BPE trained on the corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ssa.errors import ConfigError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ``<|bos|>``, ``<|eos|>`` and ``<|pad|>``; any text comes back as it was.

    Raises:
        ConfigError: a vocabulary too small for the 256 bytes and the special tokens.
    """
    smallest = _BYTES + 3
    if vocab_size < smallest:
        raise ConfigError("vocab_size", vocab_size, f"at least {smallest}: every byte and three special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def load_tokenizer(name_or_path: str, *, download: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder, or by hub name from the local cache (``download=True`` may fetch it).

    Never runs code from the folder.

    Raises:
        ConfigError: none found there.
    """
    where = f"tokenizer {name_or_path}"
    hint = "a folder with tokenizer.json" if download else "a folder with tokenizer.json, or --download"
    try:
        found = AutoTokenizer.from_pretrained(name_or_path, local_files_only=not download, trust_remote_code=False)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # absent, or JSON of another shape
        raise ConfigError(where, _reason(error), "a Hugging Face tokenizer", hint) from error
    except Exception as error:
        if type(error) is not Exception:  # `tokenizers` raises that class itself for a file that it cannot read
            raise
        raise ConfigError(where, _reason(error), "a Hugging Face tokenizer", hint) from error
    if not isinstance(found, PreTrainedTokenizerFast):
        raise ConfigError(where, type(found).__name__, "a fast tokenizer (tokenizer.json)")
    return found


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no reason given')}"


def begin_with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which from now on begins each text with BOS, as every document in training begins.

    Tokenizers that do so already, and those without a BOS, stay as they are.
    """
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] != [bos]:
        token = str(tokenizer.bos_token)
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, bos)]
        )
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id; not the number of entries, because some vocabularies have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of the tokenizer's own description: equal ids for equal text."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
