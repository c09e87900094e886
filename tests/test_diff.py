"""Diffing: planted changes are found, numbers are those of a dense computation."""

import dataclasses

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from tiny_sae import basis_sae, make_sae, with_random_adapter

from saetools.changes import FDR
from saetools.data import POSITIONS, Conversation, select_positions, tokenize
from saetools.diff import DiffConfig, LatentDiff, diff_latents
from saetools.errors import InputError, IntegrityError, SaetoolsWarning
from saetools.models import Site, read
from saetools.sae.identity import sae_site
from saetools.significance import false_discovery_rates, mean_p_values, sign_flip_p_values

FILES = ["conversations.parquet", "diff.json", "latents.parquet", "tensors.safetensors"]
SETTINGS = {field.name for field in dataclasses.fields(DiffConfig)}
EXPECTED = (
    "ignore:.*(the SAE is blind|the SAE misses most|the SAE does not fit|the two models are equal|no latent was tested)"
)
pytestmark = pytest.mark.filterwarnings(EXPECTED + ":saetools.errors.SaetoolsWarning")

CHATS = [
    Conversation.chat(user, answer, id=user)
    for user, answer in (
        ("Hi", "Hello to you."),
        ("What is the weather like?", "Sunny."),
        ("Name a colour, please.", "Red, or maybe blue."),
        ("How do I bake bread?", "Flour, water, salt."),
        ("Why?", "Because it is so."),
    )
]


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


@pytest.fixture(scope="module")
def organism(make_tiny):
    """A tiny model with an adapter that writes one direction of `basis_sae` at its site, more or less on each token."""
    tuned = with_random_adapter(make_tiny("llama"), target_modules=r".*layers\.1\.mlp\.down_proj")
    inner = []
    down = tuned.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _module, args: inner.append(args[0]))
    with torch.no_grad():
        tokens = next(tokenize(CHATS[:1], tuned.tokenizer)).token_ids[None]
        read(tuned.base, tokens, torch.ones_like(tokens, dtype=torch.bool), [Site(1)])
        handle.remove()
        down.lora_A["tuned"].weight.zero_()[0] = 3 * torch.nn.functional.normalize(inner[0].mean((0, 1)), dim=0)
        down.lora_B["tuned"].weight.zero_()[:, 0] = basis_sae().W_dec[20]
    return tuned


def diff(base, tuned, sae=None, **settings):
    config = DiffConfig(**{"n_resamples": 50, **{name: settings.pop(name) for name in SETTINGS & set(settings)}})
    return diff_latents(base, tuned, sae or basis_sae(), CHATS, config=config, **settings)


def dense_means(lm, sae, positions):
    """Mean activation and firing rate of each conversation, one by one and without padding."""
    rows = []
    for one in tokenize(CHATS, lm.tokenizer):
        with torch.no_grad():
            x = read(lm, one.token_ids[None], torch.ones(1, len(one), dtype=torch.bool), [Site(1)])[Site(1)][0, 1:]
            f = sae.encode(x[select_positions(one.roles[1:], positions)]).to_dense()
        rows.append(torch.stack([f.mean(0), (f > 0).float().mean(0)]))
    return torch.stack(rows, 1).double()


def test_a_planted_direction_ranks_first_and_alone(organism):
    found = diff(organism.base, organism)
    top = found.top(1).row(0, named=True)
    assert (top["latent"], top["rank"]) == (20, 1)
    assert top["low"] > 0.1
    assert found.table.filter(pl.col("latent") != 20)["delta"].abs().max() < 1e-5
    backwards = diff(organism, organism.base)
    assert backwards.top(1, decreases=True)["latent"].item() == 20
    assert backwards.table["rank"][20] == 32
    assert backwards.table["delta"][20] == pytest.approx(-top["delta"])


def test_rounding_is_no_change(organism):
    """A large change of one latent leaks into all others, the same way on all texts, as far as float32 resolves."""
    words = [chat.messages[0].content.split()[0] for chat in CHATS]
    chats = [Conversation.chat(f"{first} {second}", "Yes.") for first in words for second in words]
    found = diff_latents(organism.base, organism, basis_sae(), chats, positions="prompt")
    tested = found.table.filter(pl.col("q_value").is_not_null())
    assert len(tested) > 20
    assert tested.filter(pl.col("q_value") <= FDR)["latent"].to_list() == [20]
    change = found.conversations["tuned"] - found.conversations["base"]
    latents = found.conversations["latent"].to_torch().long()
    flips = sign_flip_p_values(change.to_torch(), latents, 32)[tested["latent"].to_torch()]
    assert (false_discovery_rates(flips) <= FDR).sum() > 10


def test_a_full_fine_tune_is_compared_as_a_model_of_its_own(make_tiny):
    sae = basis_sae()
    base, tuned = make_tiny("gpt2"), make_tiny("gpt2")
    with torch.no_grad():
        tuned.layers[1].mlp.c_proj.bias += 50 * sae.W_dec[11]
    table = diff(base, tuned, sae, positions="all").table
    assert table["rank"][11] == 1
    assert table["rate_tuned"][11] == 1
    assert table.filter(pl.col("latent") != 11)["delta"].abs().max() < 1e-4
    mean_base = table["mean_base"][11]
    assert 49 - mean_base < table["delta"][11] < 51


@pytest.mark.parametrize("positions", POSITIONS)
def test_numbers_are_those_of_a_dense_computation(organism, positions):
    sae = make_sae("jumprelu")
    found = diff(organism.base, organism, sae, positions=positions, batch_tokens=60, min_active=4)
    means = {name: dense_means(lm, sae, positions) for name, lm in (("base", organism.base), ("tuned", organism))}
    delta = means["tuned"][0] - means["base"][0]
    sd = delta.std(0)
    expected = {
        "latent": torch.arange(48),
        **{f"mean_{name}": both[0].mean(0) for name, both in means.items()},
        **{f"rate_{name}": both[1].mean(0) for name, both in means.items()},
        "rate_delta": (means["tuned"][1] - means["base"][1]).mean(0),
        "n_active": (means["base"][1] + means["tuned"][1] > 0).sum(0),
        "delta": delta.mean(0),
        "se": sd / 5**0.5,
        "n_conversations": torch.full((48,), 5),
    }
    for name, values in expected.items():
        ours = torch.tensor(found.table[name].to_list(), dtype=torch.double)
        torch.testing.assert_close(
            ours, values.double(), rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = sd > 1e-3
    effect = torch.tensor(found.table["effect"].to_list(), dtype=torch.double)
    torch.testing.assert_close(effect[moved], (delta.mean(0) / sd)[moved], rtol=1e-2, atol=1e-3)
    assert delta.abs().max() > 0.05
    tested = (means["base"][1] + means["tuned"][1] > 0).sum(0) >= 4
    assert found.table["p_value"].is_not_null().to_list() == tested.tolist()
    n_tested = int(tested.sum())
    p_values = mean_p_values(delta.T[tested].flatten(), torch.arange(n_tested).repeat_interleave(5), n_tested)
    close = {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(found.table["p_value"].drop_nulls().to_torch(), p_values, **close)
    torch.testing.assert_close(found.table["q_value"].drop_nulls().to_torch(), false_discovery_rates(p_values), **close)
    assert (found.table["low"] <= found.table["delta"] + 1e-6).all()
    assert (found.table["high"] >= found.table["delta"] - 1e-6).all()


def test_a_model_does_not_differ_from_itself(organism):
    for lm in (organism, organism.base):
        with pytest.warns(SaetoolsWarning, match="all: the two models are equal at this site"):
            found = diff(lm, lm, make_sae(), positions="all", min_active=1)
        table = found.table
        assert found.warnings
        assert set(table["p_value"].drop_nulls()) == {1.0}
        assert not table.select("delta", "low", "high", "se", "effect").to_numpy().any()
        assert table["mean_base"].max() > 0
        assert table["rank"].to_list() == list(range(1, 49))


def test_ranks_order_the_changes(organism):
    found = diff(organism.base, organism, make_sae(), positions="all")
    by_rank = found.table.sort("rank")
    assert by_rank["rank"].to_list() == list(range(1, 49))
    assert by_rank["delta"].is_sorted(descending=True)
    assert_frame_equal(found.top(5), by_rank.head(5))
    assert found.top(3, decreases=True)["delta"].is_sorted()
    assert found.top(3, decreases=True)["delta"][0] == found.table["delta"].min()
    assert len(found.top(1000)) == 48
    with pytest.raises(InputError, match="n: expected 1 or more"):
        found.top(0)


def test_batches_and_seeds(organism):
    sae = make_sae()
    plain = diff(organism.base, organism, sae)
    done = []
    batches = diff(organism.base, organism, sae, batch_tokens=1, on_progress=lambda *args: done.append(args))
    assert_frame_equal(batches.table, plain.table, abs_tol=1e-5)
    assert done == [(number, 5) for number in range(1, 6)]
    other = diff(organism.base, organism, sae, seed=1)
    assert not other.table["low"].equals(plain.table["low"])
    assert other.table["delta"].equals(plain.table["delta"])


def test_several_roles_in_one_pass_are_those_of_one_each(organism):
    sae = make_sae("jumprelu")
    together = diff(organism.base, organism, sae, positions=POSITIONS)
    assert together.positions == POSITIONS
    for role in POSITIONS:
        alone = diff(organism.base, organism, sae, positions=role)
        assert_frame_equal(together.at(role).table, alone.table)
        assert_frame_equal(together.at(role).conversations, alone.conversations)
        assert_frame_equal(together.at(role).top(3), alone.top(3))
    with pytest.raises(InputError, match=r"positions: expected one role, received prompt.*pick one with \.at"):
        together.top(3)
    with pytest.raises(InputError, match="positions: expected one of header, received 'prompt'"):
        together.at("header").at("prompt")


def test_conversations_hold_every_mean(organism):
    found = diff(organism.base, organism, make_sae(), positions="response")
    means = pl.col("base", "tuned").sum() / 5
    sums = found.conversations.group_by("latent").agg(means, pl.len().alias("n")).sort("latent")
    table = found.table.filter(pl.col("n_active") > 0)
    assert table["latent"].to_list() == sums["latent"].to_list()
    assert table["n_active"].to_list() == sums["n"].to_list()
    for side in ("base", "tuned"):
        torch.testing.assert_close(table[f"mean_{side}"].to_torch(), sums[side].to_torch().double())


def test_a_saved_diff_is_the_same_and_a_changed_one_is_noticed(organism, tmp_path):
    found = diff(organism.base, organism, max_tokens=40)
    assert found.provenance["n_truncated"] > 0
    loaded = LatentDiff.load(found.save(tmp_path / "run"))
    assert loaded.table.equals(found.table)
    assert loaded.table.schema == found.table.schema
    assert loaded.provenance == found.provenance
    assert loaded.conversations.equals(found.conversations)
    assert torch.equal(loaded.adequacy["prompt"].rest_directions, found.adequacy["prompt"].rest_directions)
    assert loaded.adequacy["prompt"].row() == found.adequacy["prompt"].row()
    assert {found.provenance[side]["adapter"] for side in ("base", "tuned")} == {None, "tuned"}
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == FILES
    found.table.head(3).write_parquet(tmp_path / "run" / "latents.parquet")
    with pytest.raises(IntegrityError, match="has changed since it was saved"):
        LatentDiff.load(tmp_path / "run")
    with pytest.raises(InputError, match="path: expected a folder with"):
        LatentDiff.load(tmp_path)


def test_the_figure_shows_latents_that_fire(organism):
    found = diff(organism.base, organism, make_sae())
    (trace,) = found.figure(n_labels=2).data
    fires = found.table.filter((pl.col("rate_base") > 0) | (pl.col("rate_tuned") > 0))
    assert len(trace.x) == len(fires) < 48
    named = {int(label) for label in trace.text if label}
    assert named <= set(found.top(2)["latent"]) | set(found.top(1, decreases=True)["latent"])
    assert str(found.top(1)["latent"].item()) in trace.text
    (one,) = found.figure(n_labels=1).data
    assert [label for label in one.text if label] == [str(found.top(1)["latent"].item())]
    unknown = dataclasses.replace(found, table=found.table.with_columns(pl.lit(None, pl.Float64).alias("high")))
    assert all("nan" not in text and ", ?]<br>" in text for text in unknown.figure().data[0].hovertext)


def test_too_few_conversations_to_test_anything_are_a_warning(organism):
    """Not only rare latents: with five conversations none is active in ten."""
    with pytest.warns(
        SaetoolsWarning, match="response: no latent was tested: none is active in min_active=10 of the 5"
    ):
        found = diff(organism.base, organism, make_sae(), positions=("prompt", "response"))
    told = [text.partition(": none")[0] for text in found.warnings if "tested" in text]
    assert told == ["prompt: no latent was tested", "response: no latent was tested"]
    assert found.summary(1)["warnings"] == list(found.warnings)
    tested = diff(organism.base, organism, make_sae(), positions=("prompt", "response"), min_active=5)
    assert tested.table["q_value"].is_not_null().any()
    assert not any("tested" in text for text in tested.warnings)


def test_a_summary_has_increases_and_decreases(organism):
    found = diff(organism.base, organism, make_sae("jumprelu"))
    one = found.summary(4)["positions"]["prompt"]
    for key, sign, rows in (("top", 1, found.top(4)), ("decreases", -1, found.top(4, decreases=True))):
        assert [row["latent"] for row in one[key]] == rows["latent"].to_list()
        assert all(sign * row["delta"] > 0 for row in one[key])
    alone = diff(organism.base, organism).summary(40)["positions"]["prompt"]  # what did not rise is no increase
    assert all(row["delta"] > 0 for row in alone["top"])
    assert all(row["delta"] < 0 for row in alone["decreases"])
    assert len(alone["top"]) + len(alone["decreases"]) <= 32


def test_what_cannot_be_compared_is_an_error(lm, organism, make_tiny):
    for settings, message in (
        ({"sae": make_sae(d_in=16)}, "sae: expected an SAE of width 32, received 16"),
        ({"sae": make_sae(site="")}, "site: .*pass site="),
        ({"tuned": make_tiny("llama", num_hidden_layers=2)}, "tuned: expected the base's architecture"),
        ({"sae": make_sae(site="blocks.9.hook_resid_post")}, "site: expected a layer below 3"),
    ):
        tuned = settings.pop("tuned", lm)
        with pytest.raises(InputError, match=message):
            diff(lm, tuned, **settings)
    with pytest.raises(InputError, match="two or more with tokens at 'response', received 1 of 2"):
        diff_latents(lm, lm, make_sae(), [CHATS[0], Conversation(text="no answer")], positions="response")
    with pytest.raises(InputError, match="at 'prompt', received 1 of 2"):  # a first position does not count
        diff_latents(lm, lm, make_sae(), [CHATS[0], Conversation(text="a")], positions="prompt")
    assert sae_site(make_sae()) == Site(1)
    elsewhere = diff(organism.base, organism, make_sae(site=""), site=Site(0))
    assert not elsewhere.table["delta"].to_numpy().any()
    assert elsewhere.provenance["site"] == "blocks.0.hook_resid_post"


@pytest.mark.parametrize("positions", ["header", "last_prompt"])
def test_prompts_are_read_with_what_opens_an_answer(organism, positions):
    prompts = [Conversation(chat.messages[:1]) for chat in CHATS]
    diff = diff_latents(organism.base, organism, basis_sae(), prompts, positions=positions)
    answered = diff_latents(organism.base, organism, basis_sae(), CHATS, positions=positions)
    torch.testing.assert_close(diff.table["mean_tuned"].to_torch(), answered.table["mean_tuned"].to_torch())
    mixed = diff_latents(organism.base, organism, basis_sae(), prompts[:3] + CHATS[3:], positions=positions)
    assert_frame_equal(mixed.table, answered.table, abs_tol=1e-5)


def test_damaged_facts_and_no_resamples(organism, tmp_path):
    diff_latents(organism.base, organism, basis_sae(), CHATS, positions="prompt").save(tmp_path)
    (tmp_path / "diff.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"diff\.json is damaged"):
        LatentDiff.load(tmp_path)
    with pytest.raises(InputError, match="n_resamples: expected 1 or more, received 0"):
        diff_latents(organism.base, organism, basis_sae(), CHATS, config=DiffConfig(n_resamples=0))


def test_maxima_and_quantiles_are_those_of_all_tokens(organism):
    sae, roles = make_sae("jumprelu"), ("prompt", "response")
    found = diff(organism.base, organism, sae, positions=roles, batch_tokens=60)
    seen = []
    for role in roles:
        table = found.at(role).table
        for side, lm in (("base", organism.base), ("tuned", organism)):
            tokens = []
            for one in tokenize(CHATS, lm.tokenizer):
                with torch.no_grad():
                    x = read(lm, one.token_ids[None], torch.ones(1, len(one), dtype=torch.bool), [Site(1)])[Site(1)]
                    tokens.append(sae.encode(x[0, 1:][select_positions(one.roles[1:], role)]).to_dense())
            sizes = torch.cat(tokens).abs()
            largest = sizes.amax(0)
            torch.testing.assert_close(table[f"max_{side}"].to_torch(), largest, rtol=1e-4, atol=1e-5)
            ordered, n_active = sizes.sort(0, descending=True).values, (sizes > 0).sum(0)
            for q in (0.5, 0.9, 0.99):
                place = ((1 - q) * (n_active - 1)).round().long().clamp_min(0)
                expected = ordered.gather(0, place[None])[0]
                ours = table[f"p{100 * q:.0f}_{side}"].to_torch()
                torch.testing.assert_close(ours, expected, rtol=0.016, atol=1e-5)
                seen.append(expected)
    assert all((one > 0).any() for one in seen)
    prompt_median, prompt_tail, response_median = seen[0], seen[1], seen[6]
    assert (prompt_median < prompt_tail).any()  # quantiles, roles and sides are not the same numbers
    assert not torch.allclose(prompt_median, response_median, rtol=0.1)
    assert not torch.allclose(prompt_tail, seen[4], rtol=0.02)
