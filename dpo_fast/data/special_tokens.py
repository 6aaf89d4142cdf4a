"""BOS and EOS tokens that a text brings along, although the tokenizer or the chat template adds them.

Such rows are trained as they are, as TRL does; here they are found.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CURE = "more often than the tokenizer or the chat template adds it; take it out of the text, or of the token ids"


def repeats_bos(
    prompt: Sequence[int], completions: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> bool:
    """Return whether a sequence holds a second BOS token; the first one of a turn, after EOS, counts as none."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or bos == eos:
        return False
    for ids in completions:
        if prompt.count(bos) + ids.count(bos) > 1:
            whole = [*prompt, *ids]
            places = [k for k, token in enumerate(whole) if token == bos and eos not in whole[max(k - 2, 0) : k]]
            if len(places) > 1:
                return True
    return False


def repeats_eos(completions: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether an EOS token follows another one in a completion, with nothing but white space between them."""
    eos = tokenizer.eos_token_id
    for ids in completions:
        if eos is not None and ids.count(eos) > 1:
            places = [k for k, token in enumerate(ids) if token == eos]
            for first, second in zip(places, places[1:], strict=False):
                if second - first <= 3 and not tokenizer.decode(ids[first + 1 : second]).strip():
                    return True
    return False
