"""The table of semantics in `saetools.steer`, row by row, on residuals that are made up."""

import copy

import numpy as np
import pytest
import torch
from test_steer import here
from tiny_sae import DEAD, make_sae

import saetools
from saetools import Site, read, steer
from saetools.data import Role
from saetools.errors import InputError
from saetools.models import Where

V = torch.randn(32, generator=torch.Generator().manual_seed(2))
U = V / V.norm()
W = torch.randn(32, generator=torch.Generator().manual_seed(3))
X = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
NORM = 2.5


@pytest.fixture(scope="module", params=["topk", "jumprelu", "plain", "gated", "abs_topk", "pursuit"])
def sae(request):
    return make_sae(request.param, median_norm=NORM)


def latents_of(sae, x=X):
    return sae.encode(x.reshape(-1, 32)).to_dense().view(*x.shape[:-1], -1)


def some_latent(sae):
    """One that is active on some tokens and not on others."""
    return int(((latents_of(sae) != 0).float().mean((0, 1)) - 0.5).abs().argmin())


def changed(edit, x=X, **facts):
    """What an edit adds, on all tokens."""
    everywhere = edit if facts else edit.on(skip_first=False)
    where = here(x)
    return everywhere(x, Where(**{**vars(where), **facts})) - x


def same(ours, expected):
    torch.testing.assert_close(ours, expected.expand_as(ours), rtol=1e-4, atol=1e-5)


def test_rows_of_latents(sae):
    j = some_latent(sae)
    f, row = latents_of(sae)[..., j, None], sae.W_dec[j]
    unit, length, p99 = row / row.norm(), row.norm(), sae.p99[j]
    assert 0 < (f != 0).float().mean() < 1
    zero = torch.zeros(())
    for edit, expected in (
        (steer.add(sae, j, 0.3), 0.3 * NORM * unit),
        (steer.add(sae, j, 0.3, unit="activation"), 0.3 * row),
        (steer.add(sae, j, -0.3, unit="p99"), -0.3 * p99 * row),
        (steer.clamp(sae, j, 1.5), (1.5 - f) * row),
        (steer.clamp(sae, j, -2.0, unit="p99"), (-2 * p99 - f) * row),
        (steer.clamp(sae, j, 0.2, unit="norm"), (0.2 * NORM / length - f) * row),
        (steer.clamp_min(sae, j, 1.5), ((1.5 - f).clamp_min(0)) * row),
        (steer.clamp_min(sae, j, 0.5, unit="p99"), ((0.5 * p99 - f).clamp_min(0)) * row),
        (steer.clamp_max(sae, j, 0.2, unit="norm"), ((0.2 * NORM / length - f).clamp_max(0)) * row),
        (steer.clamp_max(sae, j, 0.5), ((0.5 - f).clamp_max(0)) * row),
        (steer.clamp_max(sae, j, -1.0), (-1 - f).clamp_max(0) * row),
        (steer.scale(sae, j, 3.0), 2 * f * row),
        (steer.scale(sae, j, -1.0), -2 * f * row),
        (steer.ablate(sae, j), -f * row),
    ):
        same(changed(edit), expected)
    for edit, expected in (
        (steer.add(sae, j, 0.3, only_if_active=True), 0.3 * NORM * unit),
        (steer.add(sae, j, 0.3, unit="activation", only_if_active=True), 0.3 * row),
        (steer.clamp(sae, j, 1.5, only_if_active=True), (1.5 - f) * row),
        (steer.clamp_min(sae, j, 1.5, only_if_active=True), (1.5 - f).clamp_min(0) * row),
        (steer.clamp_max(sae, j, -1.0, only_if_active=True), (-1 - f).clamp_max(0) * row),
    ):
        same(changed(edit), torch.where(f != 0, expected, zero))


def test_several_latents_add_up(sae):
    i, j = 3, 11
    both = steer.clamp(sae, [i, j], [1.0, 2.0])
    same(changed(both), changed(steer.clamp(sae, i, 1.0)) + changed(steer.clamp(sae, j, 2.0)))
    units = sae.W_dec[[i, j]] / sae.W_dec[[i, j]].norm(dim=1, keepdim=True)
    same(changed(steer.add(sae, [i, j], [0.1, -0.2])), NORM * (0.1 * units[0] - 0.2 * units[1]))


def test_rows_of_directions():
    along = (X @ U)[..., None]
    matrix, bias, mean = 0.1 * torch.randn(32, 32), torch.randn(32), torch.randn(32)
    two = torch.stack([V, torch.randn(32)])
    basis = torch.linalg.qr(two.T).Q.T
    for edit, expected in (
        (steer.add_direction(V, -2.0), -2 * V),
        (steer.add_direction(5 * V, 0.3, median_norm=NORM), 0.3 * NORM * U),
        (steer.project_out(5 * V), -along * U),
        (steer.project_out(two), -(X @ basis.T) @ basis),
        (steer.project_to(-5 * V, 2.0), (2 + along) * -U),
        (steer.mean_ablate(5 * V, mean), (mean @ U - along) * U),
        (steer.cap(V, high=0.5), (0.5 - along).clamp_max(0) * U),
        (steer.cap(V, low=0.5), (0.5 - along).clamp_min(0) * U),
        (steer.cap(V, low=-0.5, high=0.5), (along.clamp(-0.5, 0.5) - along) * U),
        (steer.affine(matrix, bias), X @ matrix.T + bias - X),
        (steer.affine(matrix), X @ matrix.T - X),
    ):
        same(changed(edit), expected)


def test_a_sum_reads_x_once(sae):
    parts = [
        steer.clamp(sae, 3, 2.0),
        steer.ablate(sae, 11),
        steer.project_out(V),
        steer.add(sae, 5, 0.4),
        steer.clamp(make_sae("relu"), 3, 1.0),
    ]
    total = sum(parts[1:], parts[0])
    same(changed(total), sum(changed(part) for part in parts))
    backwards = sum(parts[-2::-1], parts[-1])
    same(changed(backwards), changed(total))


def test_in_a_sum_the_later_change_of_a_latent_has_the_last_word(sae):
    j = some_latent(sae)
    f, row = latents_of(sae)[..., j, None], sae.W_dec[j]
    same(changed(steer.clamp(sae, j, 2.0) + steer.clamp(sae, j, 1.0)), (1 - f) * row)
    same(changed(steer.clamp(sae, j, 2.0) + steer.scale(sae, j, 3.0)), (6 - f) * row)
    same(changed(steer.scale(sae, j, 3.0) + steer.clamp_max(sae, j, 1.0)), ((3 * f).clamp_max(1) - f) * row)
    same(changed(steer.add(sae, j, 0.3) + steer.clamp(sae, j, 0.0)), -f * row)
    was_active = steer.ablate(sae, j) + steer.clamp(sae, j, 2.0, only_if_active=True)  # active in x
    same(changed(was_active), torch.where(f != 0, 2 - f, 0.0) * row)


def test_a_list_reads_what_the_first_left(sae):
    j = some_latent(sae)
    first, then = steer.add_direction(sae.encoder[j], 1.0), steer.clamp(sae, j, 2.0)
    middle = X + changed(first)
    f = latents_of(sae, middle)[..., j, None]
    same(changed(then, middle), (2 - f) * sae.W_dec[j])
    assert not torch.allclose(changed(then, middle) + middle - X, changed(first + then), atol=1e-2)


def test_conditions_read_the_tokens_own_residual(sae):
    j = some_latent(sae)
    f = latents_of(sae)
    threshold = float(f[..., j][f[..., j] != 0].median())
    push = steer.add_direction(V, 1.0)
    score = (X @ V)[..., None]
    for edit, holds in (
        (push.when(steer.active(sae, j)), f[..., j, None] != 0),
        (push.when(steer.active(sae, j, above=threshold)), f[..., j, None] > threshold),
        (push.unless(steer.active(sae, j)), f[..., j, None] == 0),
        (push.unless(steer.active(sae, j, above=threshold)), f[..., j, None] <= threshold),
        (push.when(steer.probe(V, above=1.0)), score > 1),
        (push.when(steer.active(sae, j)).unless(steer.probe(V)), (f[..., j, None] != 0) & (score <= 0)),
    ):
        assert 0 < holds.float().mean() < 1
        same(changed(edit), torch.where(holds, V, 0.0))
    other = steer.clamp(sae, DEAD, 3.0).when(steer.active(sae, j))
    same(changed(other), torch.where(f[..., j, None] != 0, 3 * sae.W_dec[DEAD], 0.0))
    both = steer.ablate(sae, j) + steer.clamp(sae, DEAD, 3.0).when(steer.active(sae, j))  # in x, not after the first
    same(changed(both), changed(steer.ablate(sae, j)) + changed(other))


def test_conditions_may_ask_another_sae(sae):
    other = make_sae("relu")
    j = some_latent(other)
    f = latents_of(other)[..., j, None]
    edit = steer.ablate(sae, 3).when(steer.active(other, j))
    same(changed(edit), torch.where(f > 0, changed(steer.ablate(sae, 3)), torch.zeros(())))


@pytest.mark.parametrize("input_norm", ["layer_norm", "constant_norm"])
def test_an_sae_that_normalises_its_input_writes_as_much_as_it_decodes(input_norm):
    sae = make_sae("relu", input_norm=input_norm)
    j = some_latent(sae)
    f, scale = latents_of(sae)[..., j, None], sae.output_scale(X.reshape(-1, 32)).view(2, 6, 1)
    same(changed(steer.clamp(sae, j, 2.0)), (2 - f) * sae.W_dec[j] * scale)
    same(changed(steer.add(sae, j, 2.0, unit="activation")), 2 * sae.W_dec[j] * scale)
    unit = sae.W_dec[j] / sae.W_dec[j].norm()
    same(changed(steer.add(sae, j, 0.3)), 0.3 * NORM * unit)  # of the residual itself


def test_an_edit_at_another_site_sees_what_one_below_did(make_tiny):
    lm = make_tiny("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    push = steer.add_direction(V, 2.0)
    seen = []

    def watch(acts, where):
        seen.append(acts)
        return acts

    with torch.no_grad():
        with saetools.edit(lm, {Site(2): watch, Site(0): push}):
            both = read(lm, ids, mask, [Site(2)])[Site(2)]
        with saetools.edit(lm, {Site(0): push}):
            assert torch.equal(read(lm, ids, mask, [Site(2)])[Site(2)], both)
    assert torch.equal(seen[0], both)


def test_edits_work_in_the_precision_of_the_model_and_in_float32_at_least():
    sae, wide = make_sae("relu"), make_sae("relu", dtype=torch.float64)
    edits = {
        "latents": lambda one: steer.scale(one, [3, 4], 1.5).over({0: 1.0}),
        "affine": lambda one: steer.affine(2 * torch.eye(32).double()),
        "probe": lambda one: steer.add_direction(V.double(), 1.0).when(steer.probe(V.double())),
        "cap": lambda one: steer.cap(V.double(), high=0.5),
    }
    steps = torch.zeros(2, 6, dtype=torch.long)
    for name, make in edits.items():
        exact = changed(make(sae), steps=steps)
        assert exact.abs().max() > 0.1
        for x, one in ((X.double(), sae), (X, wide), (X.double(), wide)):
            found = changed(make(one), x, steps=steps)
            assert found.dtype == x.dtype, name
            torch.testing.assert_close(found.float(), exact, rtol=1e-4, atol=1e-5)
    low = make_sae("relu", dtype=torch.bfloat16)
    f = low.encode_some(X.reshape(-1, 32), torch.tensor([3, 4, 5, 6])).float().view(2, 6, 4)
    barely = changed(steer.scale(low, [3, 4, 5, 6], 1.002))  # less than bfloat16 can tell
    torch.testing.assert_close(barely, 0.002 * f @ low.W_dec[[3, 4, 5, 6]].float(), rtol=1e-3, atol=1e-5)


def test_tokens_that_are_left_alone_stay_though_the_sae_overflows():
    sae = make_sae("relu", dtype=torch.float16)
    x = X.clone()
    x[:, 0] *= 1e6  # an attention sink
    found = steer.clamp(sae, [3, 4], 1.0)(x, here(x))
    assert torch.equal(found[:, 0], x[:, 0])
    assert torch.isfinite(found).all()


def test_edits_can_be_copied():
    both = steer.clamp(make_sae(), 3, 1.0).when(steer.active(make_sae(), 5)) + steer.project_out(V)
    assert torch.equal(changed(copy.deepcopy(both)), changed(both))


def test_weights_over_the_tokens_of_an_answer(sae):
    steps = torch.tensor([[0, 0, 1, 2, 3, 4]] * 2)
    fading = {0: 1.0, 2: 1.0, 4: 0.0}
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 0.0])[:, None]
    for edit in (steer.add_direction(V, 1.0), steer.clamp(sae, 3, 2.0), steer.project_out(V)):
        everywhere = edit.on(skip_first=False)
        same(changed(everywhere.over(fading), steps=steps), weights * changed(everywhere, steps=steps))
    pulse = steer.add_direction(V, 1.0).over({1: 0.0, 2: 2.0, 3: 0.0})
    expected = torch.tensor([0.0, 0.0, 0.0, 2.0, 0.0, 0.0])[:, None] * V
    same(changed(pulse.on(skip_first=False), steps=steps), expected)


def test_generated_tokens_are_those_that_were_not_given():
    steps = torch.tensor([[0, 0, 1, 2, 3, 4]] * 2)
    edit = steer.add_direction(V, 1.0).on("generated")
    assert (changed(edit, steps=steps) != 0).any(-1).tolist() == [[False] * 2 + [True] * 4] * 2
    roles = torch.full((2, 6), int(Role.PROMPT), dtype=torch.uint8)
    both = steer.add_direction(V, 1.0).on("generated", "prompt")
    assert bool((changed(both, steps=steps, roles=roles) != 0).any(-1)[:, 1:].all())


def test_edits_print_as_they_are_written_and_are_read_again(sae):
    directions = {"evil": V, "probe-1": U, "other": W}
    for made, text in (
        (steer.add(sae, 3, 0.25), "add 3=0.25*norm"),
        (steer.add(sae, [3, 5], [0.25, 1 / 3], unit="activation"), f"add 3=0.25 5={1 / 3!r}"),
        (steer.add(sae, [3, 5], 0.5, unit="p99", only_if_active=True), "add 3,5=0.5*p99 if active"),
        (steer.clamp(sae, [1, 2], [0.5, -1.0]).on("response"), "clamp 1=0.5 2=-1 on response"),
        (steer.clamp(sae, 1, 0.0).over({0: 1.0, 32: 0.5}), "clamp 1=0 over 0:1,32:0.5"),
        (steer.clamp_min(sae, 1, 2.0).on(start=3, skip_special=True), "clamp_min 1=2 from 3 without special"),
        (steer.clamp_max(sae, 1, 0.5, unit="norm").on("prompt", "header"), "clamp_max 1=0.5*norm on prompt,header"),
        (steer.scale(sae, 3, 2.0).on(skip_first=False), "scale 3=2 with first"),
        (steer.ablate(sae, [3, 4]).when(steer.active(sae, 5, above=0.5)), "ablate 3,4 when 5>0.5"),
        (steer.ablate(sae, 3).unless(steer.probe(U, name="probe-1")), "ablate 3 unless probe-1>0"),
        (steer.ablate(sae, 3).when(steer.active(sae, 5)).unless(steer.active(sae, 6)), "ablate 3 when 5 unless 6"),
        (steer.add_direction(V, np.float64(1 / 3), name="evil"), f"add_direction evil={1 / 3!r}"),
        (steer.project_out(torch.stack([V, W]), name="evil,other"), "project_out evil,other"),
        (steer.add_direction(V, -2.0, name="evil"), "add_direction evil=-2"),
        (steer.add_direction(V, 0.1, median_norm=NORM, name="evil"), "add_direction evil=0.1*norm"),
        (steer.project_out(V, name="evil").on("generated"), "project_out evil on generated"),
        (steer.project_to(V, 2.5, name="evil"), "project_to evil=2.5"),
        (steer.cap(V, high=2.0, name="evil"), "cap evil=..2"),
        (steer.cap(V, low=-1.0, high=2.0, name="evil"), "cap evil=-1..2"),
        (steer.clamp(sae, 1, 0.0) + steer.ablate(sae, 2).on("response"), "clamp 1=0 + ablate 2 on response"),
    ):
        assert repr(made) == text
        again = steer.parse(text, sae=sae, directions=directions)
        assert repr(again) == text
        facts = {
            "steps": torch.tensor([[0, 0, 1, 2, 3, 4]] * 2),
            "roles": torch.tensor([[1, 2, 2, 4, 8, 8], [1, 2, 4, 8, 8, 8]], dtype=torch.uint8),
            "token_ids": torch.arange(12).view(2, 6),
            "special_ids": (4, 9),
        }
        assert torch.equal(changed(again, **facts), changed(made, **facts))
    assert repr(steer.add_direction(torch.tensor([3.0, 4.0]), -2.0)) == "add_direction (norm 5)=-2"
    assert repr(steer.mean_ablate(V, 2 * U, name="evil")).startswith("project_to evil=2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a change, such as clamp, received 'the end' in ''"),
        ("clmp 3=1", "expected one of add, clamp, .*, received 'clmp'"),
        ("clamp", "expected what to clamp, received 'nothing'"),
        ("clamp 3", "expected LATENT=VALUE, received '3'"),
        ("clamp 3=x", "expected a finite number, received 'x'"),
        ("clamp 3=nan", "expected a finite number, received 'nan'"),
        ("clamp a=1", "expected a whole number, received 'a'"),
        ("clamp 3=1*mean", r"expected number, number\*p99 or number\*norm, received '1\*mean'"),
        ("clamp 3=1 4=1*p99", "expected one unit for all latents"),
        ("clamp 3=1 on answers", "expected some of all, prompt, .*, received 'answers'"),
        ("clamp 3=1 on", "expected token roles, received 'the end'"),
        ("clamp 3=1 with second", "expected first, received 'second'"),
        ("clamp 3=1 when evil", "expected LATENT, LATENT>NUMBER or NAME>NUMBER, received 'evil'"),
        ("clamp 3=1 when \u00b2>0", "expected a direction called evil, received '\u00b2'"),
        ("clamp 3=1 over 1", "expected weights, such as 0:1,32:0, each step once, received '1'"),
        ("clamp 3=1 over 0:1,0:2", "each step once"),
        ("clamp 3=1 on prompt on response", "expected 'on' once"),
        ("clamp 3=1 on response if active", "expected `if active` right after the change"),
        ("clamp 3=1 from 1e9", "expected a whole number, received '1e9'"),
        (f"clamp {10**20}=1", "expected a whole number"),
        (f"clamp {10**10}=1", "latents: expected one or more of 0 to 47"),
        ("scale 3=2 if active", "without `if active`, received 'scale 3=2 if active'"),
        ("clamp 99=1", r"latents: expected one or more of 0 to 47, received \[99\]"),
        ("ablate 3 if active", "expected ablate without `if active`"),
        ("scale 3=1*p99", "expected scale with plain factors"),
        ("project_out evil,good", "expected a direction called evil, received 'good'"),
        ("project_out good", r"expected a direction called evil, received 'good'"),
        ("project_out evil=1", "expected project_out NAME, received 'evil=1'"),
        ("project_to evil", "expected project_to NAME=VALUE, received 'evil'"),
        ("cap evil=1", r"expected cap NAME=LOW\.\.HIGH"),
        ("add_direction evil=1*p99", "expected units of the direction, or a median norm"),
        ("ablate 3 + ", "expected a change, such as clamp, received 'the end'"),
        ("ablate 3 on all then", "expected one of if, on, .*, received 'then'"),
    ],
)
def test_text_that_is_no_edit_names_the_word(text, message):
    with pytest.raises(InputError, match=message):
        steer.parse(text, sae=make_sae(), directions={"evil": V})


def test_latents_need_an_sae_in_text():
    with pytest.raises(InputError, match="expected edits of directions, where no SAE is given"):
        steer.parse("ablate 3")
