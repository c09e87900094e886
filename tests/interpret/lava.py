"""Passages of a made-up latent that fires on the word `lava`, and endpoints that know it."""

import json
import random
import re

from saetools.interpret import LatentPassages
from saetools.latents.passage import Passage

WORDS = ["the", "of", "a", "stone", "river", "cloud", "house", "sea", "bread", "window", "paper", "garden", "letter"]


def passage(words, acts, *, document=0, dataset="made", start=0, model="base"):
    tokens = tuple(f" {word}" for word in words)
    return Passage(
        dataset=dataset,
        document=document,
        document_id=f"{dataset}/{document}",
        start=start,
        token_ids=tuple(range(len(tokens))),
        tokens=tokens,
        roles=(2,) * len(tokens),
        peak=max(range(len(acts)), key=acts.__getitem__),
        acts={model: tuple(map(float, acts))},
    )


def lava_passages(n=60, *, n_tokens=12, seed=0):
    """n passages with the word, of different strength, and n without, each of a document of its own."""
    random_words = random.Random(seed)
    active, inactive = [], []
    for document in range(n):
        words = random_words.choices(WORDS, k=n_tokens)
        inactive.append(passage(words, [0] * n_tokens, document=n + document))
        acts = [0] * n_tokens
        place = random_words.randrange(n_tokens)
        words = random_words.choices(WORDS, k=n_tokens)
        words[place], acts[place] = "lava", 1 + document / 10
        active.append(passage(words, acts, document=document))
    return LatentPassages(tuple(active), tuple(inactive))


def quoted_passages(prompt):
    """The passages of a question."""
    return [json.loads(line) for line in re.findall(r'^\d+[.:] (".*")$', prompt, flags=re.MULTILINE)]


def oracle(_number, request):
    """Names the marked word, and judges by it."""
    (message,) = request["messages"]
    prompt = message["content"]
    texts = quoted_passages(prompt)
    if '{"explanation": "..."}' in prompt:
        marked = {word for text in texts for word in re.findall(r"<< ?(\w+)>>", text)}
        return json.dumps({"explanation": f"the words {', '.join(sorted(marked))}"})
    words = re.findall(r'"the words (.*)"', prompt)[0].split(", ")
    sought = [f"<< {word}>>" if "between <<" in prompt else f" {word}" for word in words]
    return json.dumps([int(any(word in text for word in sought)) for text in texts])


def guesser(number, request):
    """Explains, and judges by throwing a coin."""
    answer = json.loads(oracle(number, request))
    if isinstance(answer, dict):
        return json.dumps(answer)
    coin = random.Random(json.dumps(request))
    return json.dumps([coin.randint(0, 1) for _ in answer])
