"""Conversations, token roles, batches, and the data that ships with saetools."""

from saetools.data.conversation import Conversation, Message, ReadReport, read_conversations
from saetools.data.roles import POSITIONS, Positions, Role, select_positions
from saetools.data.tokenize import (
    PLAIN_CHAT_TEMPLATE,
    Batch,
    TokenizedConversation,
    TokenizeReport,
    make_batches,
    pad,
    render,
    tokenize,
)

__all__ = [
    "PLAIN_CHAT_TEMPLATE",
    "POSITIONS",
    "Batch",
    "Conversation",
    "Message",
    "Positions",
    "ReadReport",
    "Role",
    "TokenizeReport",
    "TokenizedConversation",
    "make_batches",
    "pad",
    "read_conversations",
    "render",
    "select_positions",
    "tokenize",
]
