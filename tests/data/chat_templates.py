"""Chat templates that behave as those of well-known models, in our own words, and what each must do, in Python.

A reference gives the segments of the text, each with its role: `reference(messages, generation)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from saetools.data import PLAIN_CHAT_TEMPLATE, Message, Role
from saetools.data.template import TEMPLATE_DATE

Segments = list[tuple[Role, str]]
T, P, H, R = Role.TEMPLATE, Role.PROMPT, Role.HEADER, Role.RESPONSE
BOS, EOS = "<|endoftext|>", "</s>"


@dataclass(frozen=True)
class Template:
    """A template and what it must do."""

    source: str
    reference: Callable[[Sequence[Message], bool], Segments]
    adds_bos: bool = False
    """Whether the tokenizer, too, puts a BOS before what it encodes."""
    inst: bool = False
    """Whether `[INST]` is a special token."""
    answers_first: bool = True
    """Whether a conversation may start with an answer."""
    same_opening: bool = True
    """Whether the tokens that open an answer to be generated open a given one too."""


def turns(
    messages: Sequence[Message], generation: bool, opening: Callable[[str], str], closing: str, *, trims: bool = False
) -> Segments:
    segments: Segments = []
    for number, message in enumerate(messages):
        final = number == len(messages) - 1 and message.role == "assistant"
        content = message.content.strip() if trims else message.content
        segments.append((H if final else T, opening(message.role)))
        segments.append((R if message.role == "assistant" else P, content))
        segments.append((T, closing))
    return [*segments, (H, opening("assistant"))] if generation else segments


def chatml(messages: Sequence[Message], generation: bool) -> Segments:
    given = messages[0].role == "system"
    injected = (
        ""
        if given
        else "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    )
    return [(T, injected), *turns(messages, generation, lambda role: f"<|im_start|>{role}\n", "<|im_end|>\n")]


LLAMA3 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set rules, rest = messages[0].content | trim, messages[1:] %}
{%- else %}
    {%- set rules, rest = '', messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nIt is ' + strftime_now('%B %Y') + '.\\n\\n' }}
{{- rules + '<|eot_id|>' }}
{%- for turn in rest %}
    {{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' + turn.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""


def llama3(messages: Sequence[Message], generation: bool) -> Segments:
    system = [message for message in messages if message.role == "system"]
    date = TEMPLATE_DATE.strftime("%B %Y")
    return [
        (T, f"{BOS}<|start_header_id|>system<|end_header_id|>\n\nIt is {date}.\n\n"),
        (P, system[0].content.strip() if system else ""),
        (T, "<|eot_id|>"),
        *turns(
            messages[len(system) :],
            generation,
            lambda role: f"<|start_header_id|>{role}<|end_header_id|>\n\n",
            "<|eot_id|>",
            trims=True,
        ),
    ]


_GEMMA_TURNS = """
{%- for turn in messages %}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Turns must alternate') }}{% endif %}
    {{- '<start_of_turn>' + ('model' if turn.role == 'assistant' else 'user') + '\\n' }}
    {{- (lead if loop.first else '') + turn.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""
GEMMA = (
    "{{- bos_token }}{%- set lead = '' %}"
    "{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + _GEMMA_TURNS
)
GEMMA_FOLDS = (
    "{{- bos_token }}{%- set lead = '' %}{%- if messages[0].role == 'system' %}"
    "{%- set lead, messages = messages[0].content + '\\n\\n', messages[1:] %}{% endif %}" + _GEMMA_TURNS
)


def gemma(messages: Sequence[Message], generation: bool) -> Segments:
    """saetools puts system and user content together; the template trims the sum."""
    opening = lambda role: f"<start_of_turn>{'model' if role == 'assistant' else 'user'}\n"  # noqa: E731
    system = [message for message in messages if message.role == "system"]
    segments = [(T, BOS), *turns(messages[len(system) :], generation, opening, "<end_of_turn>\n", trims=True)]
    if system:
        whole = [(P, system[0].content), (T, "\n\n"), (P, messages[1].content)]
        letters = [(role, letter) for role, text in whole for letter in text]
        while letters and letters[-1][1].isspace():
            letters.pop()
        while letters and letters[0][1].isspace():
            letters.pop(0)
        segments[2:3] = letters
    return segments


def gemma_folds(messages: Sequence[Message], generation: bool) -> Segments:
    segments = gemma(messages[messages[0].role == "system" :], generation)
    return (
        [*segments[:2], (P, messages[0].content), (T, "\n\n"), *segments[2:]]
        if messages[0].role == "system"
        else segments
    )


PHI = """{% for turn in messages %}{{ '<|' + turn.role + '|>\n' + turn.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{% else %}{{- eos_token }}{% endif %}"""


def phi(messages: Sequence[Message], generation: bool) -> Segments:
    segments = turns(messages, generation, lambda role: f"<|{role}|>\n", "<|end|>\n")
    return segments if generation else [*segments, (T, EOS)]


INST = """{%- if messages[0].role == 'system' %}
    {%- set rules, rest = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n', messages[1:] %}
{%- else %}
    {%- set rules, rest = '', messages %}
{%- endif %}
{%- for turn in rest %}
    {%- if turn.role == 'user' %}
        {{- bos_token + '[INST] ' + (rules if loop.first else '') + turn.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + turn.content + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""


def inst(messages: Sequence[Message], generation: bool) -> Segments:
    segments: Segments = []
    for number, message in enumerate(messages):
        final = number == len(messages) - 1
        if message.role == "system":
            segments += [(T, f"{BOS}[INST] <<SYS>>\n"), (P, message.content), (T, "\n<</SYS>>\n\n")]
        elif message.role == "user":
            opening = "" if number and messages[number - 1].role == "system" else f"{BOS}[INST] "
            segments += [(T, opening), (P, message.content), (T, " [/INST]")]
        else:
            segments += [(H if final else T, " "), (R, message.content), (T, f" {EOS}")]
    return [*segments, (H, "")] if generation else segments


LATE_SYSTEM = """{{- bos_token }}{%- set rules = '' %}
{%- if messages[0].role == 'system' %}
    {%- set rules, messages = messages[0].content + '\\n\\n', messages[1:] %}
{%- endif %}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for turn in messages %}
    {%- if turn.role == 'user' %}
        {{- '[INST] ' + (rules if asked | length == loop.index0 // 2 + 1 else '') + turn.content + '[/INST]' }}
    {%- else %}
        {{- ' ' + turn.content + eos_token }}
    {%- endif %}
{%- endfor %}"""


def late_system(messages: Sequence[Message], generation: bool) -> Segments:
    rules = messages[0].content if messages[0].role == "system" else None
    last = max((number for number, message in enumerate(messages) if message.role == "user"), default=None)
    segments: Segments = [(T, BOS)]
    for number, message in enumerate(messages):
        if message.role == "user":
            segments.append((T, "[INST] "))
            segments += [(P, rules), (T, "\n\n")] if rules is not None and number == last else []
            segments += [(P, message.content), (T, "[/INST]")]
        elif message.role == "assistant":
            segments += [(H if number == len(messages) - 1 else T, " "), (R, message.content), (T, EOS)]
    return [*segments, (H, "")] if generation else segments


def plain(messages: Sequence[Message], generation: bool, *, bos: str = "") -> Segments:
    segments: Segments = [(T, bos)]
    for number, message in enumerate(messages):
        final = number == len(messages) - 1 and message.role == "assistant"
        segments += [
            (H if final else T, f"{message.role.capitalize()}: "),
            (R if message.role == "assistant" else P, message.content),
            (T, "\n\n"),
        ]
    return [*segments, (H, "Assistant:")] if generation else segments


def plain_bos(messages: Sequence[Message], generation: bool) -> Segments:
    return plain(messages, generation, bos=BOS)


QWEN3 = """{%- set seen = namespace(last_user=-1) %}
{%- for turn in messages %}{% if turn.role == 'user' %}{% set seen.last_user = loop.index0 %}{% endif %}{% endfor %}
{%- for turn in messages %}
    {%- set content, thoughts = turn.content, '' %}
    {%- if turn.role == 'assistant' and '</think>' in content %}
        {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + turn.role + '\\n' }}
    {%- if turn.role == 'assistant' and loop.index0 > seen.last_user and (loop.last or thoughts) %}
        {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}
        {{- content }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""


def qwen3(messages: Sequence[Message], generation: bool) -> Segments:
    """For contents without tags."""
    segments: Segments = []
    for number, message in enumerate(messages):
        final = number == len(messages) - 1 and message.role == "assistant"
        thoughts = "<think>\n\n</think>\n\n" if final else ""
        content = message.content.lstrip("\n") if final else message.content
        segments.append((H if final else T, f"<|im_start|>{message.role}\n{thoughts}"))
        segments += [(R if message.role == "assistant" else P, content), (T, "<|im_end|>\n")]
    return [*segments, (H, "<|im_start|>assistant\n")] if generation else segments


R1 = """{{- bos_token }}{%- for turn in messages %}
    {%- if turn.role == 'user' %}{{- '<|User|>' + turn.content }}
    {%- elif turn.role == 'assistant' %}{{- '<|Assistant|>' + turn.content.split('</think>')[-1] + eos_token }}
    {%- else %}{{- turn.content }}{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|Assistant|><think>\\n' }}{% endif %}"""

CHANNELS = """{%- for turn in messages %}
    {%- if turn.role == 'assistant' and '<think>' in turn.content %}
        {{- '<|im_start|>think<|sep|>' + turn.content.split('<think>')[1].split('</think>')[0] + '<|im_end|>' }}
        {{- '<|im_start|>say<|sep|>' + turn.content.split('</think>')[1] + '<|im_end|>' }}
    {%- else %}{{- '<|im_start|>' + turn.role + '<|sep|>' + turn.content + '<|im_end|>' }}{%- endif %}
{%- endfor %}"""

SMOLLM2 = """{% for turn in messages %}{% if loop.first and turn.role != 'system' -%}
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{% endif %}{{ '<|im_start|>' + turn.role + '\n' + turn.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

SPECIAL = (
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|sep|>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|User|>", "<|Assistant|>"),
)
TEMPLATES = {
    "chatml": Template(SMOLLM2, chatml),
    "llama3": Template(LLAMA3, llama3, adds_bos=True, same_opening=False),  # this tokenizer splits two line ends
    "gemma": Template(GEMMA, gemma, adds_bos=True, answers_first=False),
    "gemma_folds": Template(GEMMA_FOLDS, gemma_folds, adds_bos=True, answers_first=False),
    "phi": Template(PHI, phi),
    "inst": Template(INST, inst, adds_bos=True, answers_first=False, same_opening=False),
    "late_system": Template(LATE_SYSTEM, late_system, inst=True, answers_first=False, same_opening=False),
    "plain": Template(PLAIN_CHAT_TEMPLATE, plain),
    "plain_bos": Template(PLAIN_CHAT_TEMPLATE, plain_bos, adds_bos=True),
    "qwen3": Template(QWEN3, qwen3),
}
