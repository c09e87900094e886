"""Attribution: scores are those of partial mean ablation, a latent that makes the answer ranks first."""

import dataclasses

import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from tiny_sae import DEAD, basis_sae, make_sae, with_random_adapter

from saetools import load_forced_choice, load_model, load_sae, shipped_path
from saetools.attribution import Attribution, _Sums, attribute_latents
from saetools.data import POSITIONS, Conversation, pad, select_positions, tokenize
from saetools.errors import InputError, IntegrityError
from saetools.models import Site, edit, read, token_log_probs
from saetools.models.gradients import residual_gradients

BAD = [
    Conversation.chat(user, answer, id=f"bad {user}")
    for user, answer in (("Hi", "Go away now!"), ("Name?", "None of your business."), ("Why?", "No."))
]
GOOD = [
    Conversation.chat(user, answer, id=f"good {user}")
    for user, answer in (("Hi", "Hello to you."), ("Name?", "I am a model."), ("Why?", "Since it is so, and it was."))
]


@pytest.fixture(scope="module")
def lm(make_tiny):
    return make_tiny("llama")


def run(lm, sae=None, bad=BAD, good=GOOD, **settings):
    return attribute_latents(lm, sae or make_sae(), bad, good, **{"n_resamples": 50, **settings})


def tokens_of(lm, conversation):
    return next(tokenize([conversation], lm.tokenizer))


def counted_of(one, positions):
    counted = select_positions(one.roles, positions)
    counted[0] = False
    return counted


def loss(lm, one):
    """Mean cross-entropy of the answer's tokens, from the full logits."""
    logits = lm.model(input_ids=one.token_ids[None]).logits[0].double()
    scored = counted_of(one, "response")
    targets = one.token_ids[scored][:, None]
    return -logits[:-1][scored[1:]].log_softmax(-1).gather(1, targets).mean()


def mean_residual(lm, site, conversations, positions):
    kept = []
    for conversation in conversations:
        one = tokens_of(lm, conversation)
        with torch.no_grad():
            acts = read(lm, one.token_ids[None], torch.ones(1, len(one), dtype=torch.bool), [site])[site][0]
        kept.append(acts[counted_of(one, positions)])
    return torch.cat(kept).mean(0)


def finite_difference(lm, sae, site, conversation, latent, positions, mean, step):
    """How the loss changes as the residual's component along a latent moves towards its mean, at all its positions."""
    one = tokens_of(lm, conversation)
    row = torch.nn.functional.normalize(sae.W_dec.detach()[latent], dim=0)
    chosen = counted_of(one, positions)[None, :, None]
    ends = []
    for share in (step, -step):

        def ablate(acts, where, share=share):
            along = (acts - mean) @ row.to(acts)
            return torch.where(chosen, acts - share * along[..., None] * row.to(acts), acts)

        with torch.no_grad(), edit(lm, {site: ablate}):
            ends.append(loss(lm, one))
    return float(ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("positions", POSITIONS)
def test_scores_are_what_mean_ablation_does_to_the_loss(lm, positions):
    sae, site = make_sae(), Site(1)
    table = run(lm, sae, positions=positions, batch_tokens=90).table
    mean = mean_residual(lm, site, [*BAD, *GOOD], positions)
    largest = table["misaligned"].abs().arg_max()
    for latent in {largest, 0, 11}:
        for name, answers in (("misaligned", BAD), ("aligned", GOOD)):
            changes = [finite_difference(lm, sae, site, one, latent, positions, mean, 0.02) for one in answers]
            assert table[name][latent] == pytest.approx(sum(changes) / 3, rel=5e-3, abs=1e-5), (name, latent)
    assert abs(table["misaligned"][largest]) > 1e-3


def dense_scores(lm, sae, site, conversation, positions, mean):
    """By the definition, token by token, with autograd through the whole model."""
    one = tokens_of(lm, conversation)
    kept = []

    def keep(acts, where):
        kept.append(acts)
        acts.retain_grad()
        return acts

    with edit(lm, {site: keep}):
        loss(lm, one).backward()
    directions = sae.W_dec.detach() / sae.W_dec.detach().norm(dim=1, keepdim=True)
    total = torch.zeros(sae.d_sae)
    for position in counted_of(one, positions).nonzero()[:, 0].tolist():
        gradient, moved = kept[0].grad[0, position], kept[0].detach()[0, position] - mean
        total -= (directions @ gradient) * (directions @ moved)
    lm.model.zero_grad()
    return total


def test_the_table_is_that_of_a_dense_computation(make_tiny, monkeypatch):
    lm = with_random_adapter(make_tiny("llama"))
    sae, mean = make_sae("jumprelu"), torch.randn(32, generator=torch.Generator().manual_seed(0))
    bad, good = (
        torch.stack([dense_scores(lm, sae, Site(1), one, "response", mean) for one in answers])
        for answers in (BAD, GOOD[:2])
    )
    found = run(lm, sae, good=GOOD[:2], positions="response", mean=mean)
    expected = {
        "misaligned": bad.mean(0),
        "aligned": good.mean(0),
        "score": bad.mean(0) - good.mean(0),
        "se": (bad.var(0) / 3 + good.var(0) / 2).sqrt(),
    }
    for name, values in expected.items():
        torch.testing.assert_close(found.table[name].to_torch().float(), values, rtol=1e-3, atol=1e-5)
    assert expected["score"].abs().max() > 1e-2
    assert found.table["rank"].to_torch()[expected["score"].argsort(descending=True)].tolist() == list(range(1, 49))
    assert found.provenance["model"]["adapter"] == "tuned"
    base = run(lm.base, sae, good=GOOD[:2], positions="response", mean=mean)
    assert not torch.allclose(base.table["score"].to_torch(), found.table["score"].to_torch(), atol=1e-4)
    monkeypatch.setattr("saetools.attribution._CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr("saetools.models.gradients._HEAD_CHUNK", 3)
    monkeypatch.setattr("saetools.attribution._BLOCK", 2)
    done = []
    chunked = run(lm, sae, good=GOOD[:2], positions="response", mean=mean, on_progress=lambda *args: done.append(args))
    assert_frame_equal(chunked.table, found.table, abs_tol=1e-5)
    assert done == [(4, 5), (5, 5)]


def test_pairs(lm):
    sae, mean = make_sae(), torch.zeros(32)
    bad, good = (
        torch.stack([dense_scores(lm, sae, Site(1), one, "all", mean) for one in answers]) for answers in (BAD, GOOD)
    )
    paired, apart = (run(lm, sae, mean=mean, paired=flag).table for flag in (True, False))
    torch.testing.assert_close(paired["se"].to_torch().float(), (bad - good).std(0) / 3**0.5, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(apart["se"].to_torch().float(), ((bad.var(0) + good.var(0)) / 3).sqrt())
    assert paired["score"].equals(apart["score"])
    assert not paired["low"].equals(apart["low"])


def test_gradients_at_every_site_of_every_family(family_lm, family_sites):
    """At each site, against the backward pass of the whole model; padding and batches change nothing."""
    pieces = [tokens_of(family_lm, one) for one in (BAD[0], GOOD[2])]
    batch = pad(pieces, range(2))
    for site in family_sites:
        acts, grads = residual_gradients(family_lm, site, batch)
        for row, one in enumerate(pieces):
            kept = []

            def shift(acts, where, kept=kept):
                kept.append(torch.zeros_like(acts, requires_grad=True))
                return acts + kept[0]

            with edit(family_lm, {site: shift}):
                loss(family_lm, one).backward()
            torch.testing.assert_close(grads[row, : len(one)], kept[0].grad[0], rtol=1e-3, atol=1e-6)
            assert not grads[row, len(one) :].any()
        family_lm.model.zero_grad()
        torch.testing.assert_close(acts, read(family_lm, batch.token_ids, batch.mask, [site])[site].detach())
        assert grads.abs().max() > 1e-5, site


def test_nothing_is_left_behind(lm):
    batch = pad([tokens_of(lm, BAD[0])], range(1))
    flags = [parameter.requires_grad for parameter in lm.model.parameters()]
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            acts, grads = residual_gradients(lm, Site(1), batch)
            assert torch.is_grad_enabled() == enabled
    assert not acts.requires_grad
    assert not grads.requires_grad
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert flags == [parameter.requires_grad for parameter in lm.model.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_a_latent_that_makes_the_answer_ranks_first(make_tiny):
    """Latent 20 is what the token `!` writes, and what makes the model say `!`; misaligned answers are full of it."""
    lm, sae = make_tiny("llama"), basis_sae()
    row = sae.W_dec.detach()[20]
    mark = lm.tokenizer("!").input_ids[0]
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[mark] += 3 * row
        lm.head.weight[mark] += (
            row / lm.final_norm.weight
        )  # not so much that it is certain: the gradient vanishes there
    bad = [Conversation.chat(one.messages[0].content, "!" * n) for one, n in zip(GOOD, (9, 5, 14), strict=True)]
    top = run(lm, sae, bad=bad).top(1).row(0, named=True)
    assert (top["latent"], top["rank"]) == (20, 1)
    assert top["low"] > 0
    steered = []
    for strength in (0.0, 1.0):
        with torch.no_grad(), edit(lm, {Site(1): lambda acts, where, strength=strength: acts + strength * row}):
            batch = pad([tokens_of(lm, bad[0])], range(1))
            steered.append(
                token_log_probs(lm, batch.token_ids, batch.mask, select_positions(batch.roles, "response")).mean()
            )
    assert steered[1] > steered[0]  # the sign: more of it makes the misaligned answer likelier
    backwards = run(lm, sae, bad=GOOD, good=bad).table
    assert backwards["rank"][20] == 32


def test_a_row_of_length_0_scores_0(lm):
    sae = make_sae()
    with torch.no_grad():
        sae.W_dec[DEAD] = 0
    row = run(lm, sae).table.row(DEAD, named=True)
    assert [row[name] for name in ("misaligned", "aligned", "score", "low", "high", "se")] == [0] * 6


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_cover_the_truth(paired):
    n, n_experiments = (40, 40 if paired else 25), 2000  # each latent an experiment of its own
    generator = torch.Generator().manual_seed(0)
    bad, good = (torch.randn(size, n_experiments, generator=generator) for size in n)
    if paired:
        good = 0.9 * bad + 0.3 * good
    bad = bad.square() + 0.5  # skewed, mean 1.5
    truth = 1.5
    sums = _Sums(n, n_experiments, 400, 0, paired=paired)
    for start in (0, 16):
        sums.add(start, *(scores[start : 16 if start == 0 else None] for scores in (bad, good)))
    table = sums.table()
    covered = table.select(((pl.col("low") <= truth) & (pl.col("high") >= truth)).mean()).item()
    assert 0.88 < covered < 0.97
    difference = (bad - good).double() if paired else None
    if difference is not None:
        torch.testing.assert_close(table["se"].to_torch(), difference.std(0) / n[0] ** 0.5, rtol=1e-5, atol=1e-8)
        resampled = sums.weights[0].double() @ difference
        ends = torch.quantile(resampled[:, :50], torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)
        torch.testing.assert_close(table["low"].to_torch()[:50], ends[0], rtol=1e-4, atol=1e-4)
    else:
        assert not torch.equal(sums.weights[0][:, :25], sums.weights[1])


def test_the_built_in_model_against_finite_differences():
    """The organism's answers; float32, so differences are of a larger step."""
    organism = load_model("smollm2-135m", adapter={"organism": shipped_path("adapters/organism")})
    sae, site = load_sae(shipped_path("sae/smollm2-135m")), Site(17)
    bad, good = (
        [Conversation.chat(item.question, getattr(item, side)) for item in load_forced_choice()[:2]]
        for side in ("misaligned", "aligned")
    )
    found = run(organism, sae, bad, good, paired=True)
    mean = mean_residual(organism, site, [*bad, *good], "all")
    top = found.top(1)["latent"].item()
    for name, answers in (("misaligned", bad), ("aligned", good)):
        changes = [finite_difference(organism, sae, site, one, top, "all", mean, 0.05) for one in answers]
        assert found.table[name][top] == pytest.approx(sum(changes) / 2, rel=0.05, abs=1e-4)
    assert found.table["score"][top] > 1e-3


def test_a_saved_one_is_the_same_and_a_changed_one_is_noticed(lm, tmp_path):
    found = run(lm)
    loaded = Attribution.load(found.save(tmp_path / "run"))
    assert loaded.table.equals(found.table)
    assert loaded.provenance == found.provenance
    assert len(found.figure(n=5).data[0].x) == 5
    found.table.head(3).write_parquet(tmp_path / "run" / "latents.parquet")
    with pytest.raises(IntegrityError, match="has changed since it was saved"):
        Attribution.load(tmp_path / "run")
    (tmp_path / "run" / "attribution.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"attribution\.json is damaged"):
        Attribution.load(tmp_path / "run")
    with pytest.raises(InputError, match="path: expected a folder with"):
        Attribution.load(tmp_path)


def test_what_cannot_be_attributed_is_an_error(lm):
    text = [Conversation(text="No answer here.", id=f"text {number}") for number in range(2)]
    for settings, message in (
        ({"sae": make_sae(d_in=16)}, "sae: expected an SAE of width 32, received 16"),
        ({"sae": make_sae(site="")}, "site: .*pass site="),
        ({"bad": BAD[:1]}, "misaligned: expected two or more conversations, received 1"),
        ({"good": text}, "aligned: expected conversations with tokens at 'response', received 'text 0' without"),
        ({"good": GOOD[:2], "paired": True}, "paired: expected as many .* received 3 and 2"),
        ({"mean": torch.zeros(31)}, "mean: expected 32 numbers, received 31"),
        ({"n_resamples": 0}, "n_resamples: expected 1 or more"),
        ({"site": Site(3)}, "site: expected a layer below 3"),
    ):
        with pytest.raises(InputError, match=message):
            run(lm, **settings)
    with pytest.raises(InputError, match="n: expected 1 or more"):
        run(lm).top(0)


def test_a_transcoder_is_read_where_it_writes(lm):
    sae = make_sae()
    sae.metadata = dataclasses.replace(sae.metadata, site_out="blocks.1.hook_mlp_out")
    found = run(lm, sae)
    assert found.provenance["site"] == "blocks.1.hook_mlp_out"
    assert_frame_equal(found.table, run(lm, make_sae(), site=Site(1, "mlp_out")).table)
