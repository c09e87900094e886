"""Conversations, token roles, batches, and the data that ships with saetools."""

from saetools.data.conversation import Conversation, Message, ReadReport, read_conversations
from saetools.data.roles import POSITIONS, Positions, Role, select_positions
from saetools.data.shipped import (
    AdviceItem,
    ForcedChoiceItem,
    FreeFormItem,
    VoicePair,
    load_advice,
    load_forced_choice,
    load_free_form,
    load_voices,
    shipped_path,
)
from saetools.data.template import PLAIN_CHAT_TEMPLATE, render
from saetools.data.tokenizing import (
    Batch,
    TokenizedConversation,
    TokenizeReport,
    make_batches,
    pad,
    tokenize,
)

__all__ = [
    "PLAIN_CHAT_TEMPLATE",
    "POSITIONS",
    "AdviceItem",
    "Batch",
    "Conversation",
    "ForcedChoiceItem",
    "FreeFormItem",
    "Message",
    "Positions",
    "ReadReport",
    "Role",
    "TokenizeReport",
    "TokenizedConversation",
    "VoicePair",
    "load_advice",
    "load_forced_choice",
    "load_free_form",
    "load_voices",
    "make_batches",
    "pad",
    "read_conversations",
    "render",
    "select_positions",
    "shipped_path",
    "tokenize",
]
