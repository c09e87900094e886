"""Arguments of a wrong type, without the checks that the other tests put around every function."""

import subprocess
import sys

SCRIPT = """
import torch
import saetools
from saetools import steer
from saetools.data import Conversation
from saetools.errors import InputError

lm = saetools.load_model("smollm2-135m")
sae = saetools.load_sae(saetools.shipped_path("sae/smollm2-135m"))
chats = [Conversation.chat("Hi", "Hello.")]
calls = [
    lambda: saetools.generate(lm, "hello"),
    lambda: saetools.measure_perplexity(lm, "a text"),
    lambda: saetools.diff_latents(lm, lm, sae, ["hello"], positions="prompt"),
    lambda: saetools.harvest(lm, [saetools.Site(1)], chats, "never-made"),
    lambda: next(saetools.stream_activations(lm, [saetools.Site(1)], chats)),
    lambda: steer.clamp(sae, torch.tensor([True, False]), 1.0),
    lambda: steer.add(sae, [1.7], 1.0),
]
for call in calls:
    try:
        call()
    except InputError as error:
        print(error)
"""
EXPECTED = [
    "prompts: expected a list of prompts, received a string; pass [prompt]",
    "texts: expected a list of texts, received a string; pass [text]",
    "conversations: expected Conversation objects, received str; use Conversation.chat",
    "conversations: expected tokenised conversations, received Conversation; pass list(tokenize(",
    "conversations: expected tokenised conversations, received Conversation; pass list(tokenize(",
    "latents: expected whole numbers, received bool; pass indices, not a mask",
    "latents: expected whole numbers, received float32; pass indices, not a mask",
]


def test_wrong_types_are_named(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=tmp_path)
    for line, expected in zip(done.stdout.splitlines(), EXPECTED, strict=True):
        assert line.startswith(expected)
    assert not list(tmp_path.iterdir())
