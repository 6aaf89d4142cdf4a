"""Byte-level tokenizers built in memory: one token a byte, plus the merges that a test asks for."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Tools and template arguments show in the text, and `thinking=False` ends the generation prompt in a text that the
# conversation does not keep, as some templates do.
CHAT_TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% if style is defined %}<style>{{ style }}</style>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{% if add_generation_prompt and thinking is defined and not thinking %}<none>{% endif %}"
)


def byte_tokenizer(
    *, bos: bool = False, eos: bool = True, chat_template: str | None = CHAT_TEMPLATE, merges: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """`merges` are pairs of adjacent characters that become one token, such as "ab"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *merges])}
    backend = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>" if eos else None
    )
    tokenizer.chat_template = chat_template
    return tokenizer
