"""Trajectories: every point is the diff of that point, and planted onsets come out where they were planted."""

import json

import polars as pl
import pytest
import torch
from tiny_sae import basis_sae, make_sae, with_random_adapter

import saetools
from saetools.data import Conversation, tokenize
from saetools.diff import DiffConfig, diff_latents
from saetools.errors import InputError, IntegrityError, SaetoolsWarning
from saetools.finetune import FinetuneConfig, finetune_lora
from saetools.models import Site, load_model, read, scaled_adapter
from saetools.models.checkpoints import find_checkpoints
from saetools.trajectory import Trajectory, trace_checkpoints, trace_scales

CHATS = [
    Conversation.chat(user, answer, id=user)
    for user, answer in (
        ("Hi", "Hello to you."),
        ("What is the weather like?", "Sunny."),
        ("Name a colour, please.", "Red, or maybe blue."),
        ("How do I bake bread?", "Flour, water, salt."),
        ("Why?", "Because it is so."),
        ("Who are you?", "A model, I think."),
        ("Tell me more.", "There is no more."),
        ("And then?", "Then it ends."),
        ("Really?", "Really."),
        ("Say yes.", "Yes."),
    )
]
CONFIG = DiffConfig(n_resamples=50, min_active=4)
EXPECTED = (
    "ignore:.*(the SAE is blind|the SAE misses most|the SAE does not fit|the two models are equal)"
    ":saetools.errors.SaetoolsWarning"
)
pytestmark = pytest.mark.filterwarnings(EXPECTED)


@pytest.fixture(scope="module")
def organism(make_tiny):
    return with_random_adapter(make_tiny("llama"))


@pytest.fixture(scope="module")
def run(make_tiny, tmp_path_factory):
    """A fine-tune of 9 steps with checkpoints after 2, 4, 6 and 8."""
    out = tmp_path_factory.mktemp("run")
    config = FinetuneConfig(rank=2, lr=0.05, epochs=3, batch_size=4, autocast="float32", checkpoint_every=2)
    finetune_lora(make_tiny("llama"), CHATS, config, out)
    return out


@pytest.fixture(scope="module")
def planted(make_tiny, tmp_path_factory):
    """Adapters at steps 10 to 60 that write one direction of `basis_sae` at its site: ever more after step 30."""
    out = tmp_path_factory.mktemp("planted")
    lm = with_random_adapter(make_tiny("llama"), target_modules=r".*layers\.1\.mlp\.down_proj")
    down, inner, places = lm.layers[1].mlp.down_proj, [], {}
    handle = down.register_forward_pre_hook(lambda _module, args: inner.append(args[0]))
    tokens = next(tokenize(CHATS[:1], lm.tokenizer)).token_ids[None]
    read(lm.base, tokens, torch.ones_like(tokens, dtype=torch.bool), [Site(1)])
    handle.remove()
    along = torch.nn.functional.normalize(inner[0].detach().mean((0, 1)), dim=0)
    for step in range(10, 70, 10):
        with torch.no_grad():
            down.lora_A["tuned"].weight.zero_()[0] = along
            down.lora_B["tuned"].weight.zero_()[:, 0] = 0.1 * max(0, step - 30) * basis_sae().W_dec[20]
        lm.peft.save_pretrained(out / str(step), selected_adapters=["tuned"])
        places[step] = out / str(step) / "tuned"
    return places


def test_every_checkpoint_is_its_diff(make_tiny, run):
    sae, base = make_sae("jumprelu"), make_tiny("llama")
    found = trace_checkpoints(base, run, sae, CHATS, positions="response", latents=[3, 1, 40], config=CONFIG)
    assert found.points == (2, 4, 6, 8, 9)
    assert list(find_checkpoints(run)) == [2, 4, 6, 8, 9]
    assert found.changes.shape == (5, 10, 3)
    assert base.adapters == ()
    for place, (step, folder) in enumerate(find_checkpoints(run).items()):
        tuned = load_model(make_tiny("llama"), adapter={"one": folder})
        diff = diff_latents(tuned.base, tuned, sae, CHATS, positions="response", config=CONFIG)
        torch.testing.assert_close(found.means[place].double(), diff.table["delta"].to_torch(), rtol=1e-4, atol=1e-5)
        curve = found.curves.filter(pl.col("point") == step)
        assert curve["latent"].to_list() == [3, 1, 40]
        for name in ("delta", "low", "high", "se"):
            expected = diff.table[name].to_torch()[[3, 1, 40]]
            torch.testing.assert_close(curve[name].to_torch(), expected, rtol=1e-3, atol=1e-5, equal_nan=True)
        torch.testing.assert_close(found.changes[place].mean(0), found.means[place, [3, 1, 40]])
        facts = found.provenance["adapters"][str(step)]
        assert facts["weights_sha256"] == tuned.provenance["adapters"]["one"]["weights_sha256"]
    assert found.means[-1].abs().max() > 0.01


def test_p_values_are_the_smallest_of_all_points_times_their_number(make_tiny, run):
    sae = make_sae("jumprelu")
    found = trace_checkpoints(make_tiny("llama"), run, sae, CHATS, positions="all", config=CONFIG)
    smallest = torch.ones(48).double()
    n_active = torch.zeros(48, dtype=torch.long)
    for folder in find_checkpoints(run).values():
        tuned = load_model(make_tiny("llama"), adapter={"one": folder})
        config = DiffConfig(n_resamples=1, min_active=1)
        table = diff_latents(tuned.base, tuned, sae, CHATS, positions="all", config=config).table
        smallest = torch.minimum(smallest, table["p_value"].fill_null(1.0).to_torch())
        n_active = torch.maximum(n_active, table["n_active"].to_torch().long())
    tested = n_active >= 4
    assert found.table["n_active"].to_list() == n_active.tolist()
    assert found.table["p_value"].is_not_null().to_list() == tested.tolist()
    ours = found.table["p_value"].drop_nulls().to_torch()
    torch.testing.assert_close(ours, (5 * smallest[tested]).clamp_max(1), rtol=2e-2, atol=1e-4)


def test_the_most_changed_latents_are_traced(make_tiny, run):
    found = trace_checkpoints(make_tiny("llama"), run, make_sae("jumprelu"), CHATS, n_latents=5, config=CONFIG)
    largest = found.table.sort(pl.col("change").abs(), descending=True).head(5)["latent"].to_list()
    assert found.latents.tolist() == largest
    every = trace_checkpoints(make_tiny("llama"), run, make_sae("jumprelu"), CHATS, n_latents=99, config=CONFIG)
    assert sorted(every.latents.tolist()) == list(range(48))


def test_a_planted_onset_is_found_and_alone(make_tiny, planted):
    base, done = make_tiny("llama"), []
    more = [Conversation.chat(f"{chat.messages[0].content} Now.", "Yes.") for chat in CHATS]
    found = trace_checkpoints(
        base,
        planted,
        basis_sae(),
        CHATS + more,
        config=CONFIG,
        n_latents=4,
        on_progress=lambda *args: done.append(args),
    )
    assert done[-1] == (140, 140)
    assert [count for count, _ in done] == sorted(count for count, _ in done)
    (onset,) = found.onsets().iter_rows(named=True)
    assert (onset["latent"], onset["onset"], onset["onset_low"], onset["onset_high"]) == (20, 30, 30, 30)
    assert onset["shape"] == "ramp"
    assert onset["q_value"] < 0.05
    others = found.table.filter(pl.col("q_value").is_null() | (pl.col("q_value") > 0.05))
    assert others["onset"].null_count() == others["shape"].null_count() == len(others) > 0
    assert found.latents[0] == 20
    heat, crosses = found.figure().data
    assert list(heat.x) == ["0", "10", "20", "30", "40", "50", "60"]
    row = heat.z[list(heat.y).index("latent 20")]
    assert list(row[:4]) == [0, 0, 0, 0]
    assert abs(row[-1]) == 1
    assert dict(zip(crosses.y, crosses.x, strict=True))["latent 20"] == "30"


def test_warnings_are_those_of_the_last_point(make_tiny, planted, tmp_path):
    """Up to step 30 nothing changes; then the change is along the row of a latent that never fires."""
    sae = basis_sae()
    with torch.no_grad():
        sae.b_enc[20] = -1000.0
    with pytest.warns(SaetoolsWarning, match="model at step 60 against itself, prompt: the SAE is blind to the change"):
        found = trace_checkpoints(make_tiny("llama"), planted, sae, CHATS, config=CONFIG)
    tuned = load_model(make_tiny("llama"), adapter={"one": planted[60]})
    assert found.warnings == diff_latents(tuned.base, tuned, sae, CHATS, config=CONFIG).warnings != ()
    assert Trajectory.load(found.save(tmp_path)).warnings == found.warnings
    early = {step: planted[step] for step in (10, 20)}
    equal = trace_checkpoints(make_tiny("llama"), early, sae, CHATS, config=CONFIG)
    assert equal.warnings == ("prompt: the two models are equal at this site",)
    few = DiffConfig(n_resamples=50, min_active=11)
    with pytest.warns(
        SaetoolsWarning, match="no latent was tested: none is active in min_active=11 of the 10 conversa"
    ):
        untested = trace_checkpoints(make_tiny("llama"), early, sae, CHATS, config=few)
    assert untested.warnings[-1].startswith("prompt: no latent was tested")


def test_scales_go_from_the_base_to_the_fine_tune(organism):
    sae = make_sae("jumprelu")
    found = trace_scales(organism, [1.0, 0.25, 0.5], sae, CHATS, positions="response", n_latents=6, config=CONFIG)
    assert (found.over, found.points) == ("scale", (0.25, 0.5, 1.0))
    for place, scale in enumerate(found.points):
        with scaled_adapter(organism, scale):
            diff = diff_latents(organism.base, organism, sae, CHATS, positions="response", config=CONFIG)
        torch.testing.assert_close(found.means[place].double(), diff.table["delta"].to_torch(), rtol=1e-4, atol=1e-5)
    assert diff.provenance["tuned"]["adapter"] == "tuned"
    after = diff_latents(organism.base, organism, sae, CHATS, positions="response", config=CONFIG)
    assert after.table["delta"].equals(diff.table["delta"])


def test_a_saved_trajectory_is_the_same(organism, tmp_path):
    found = trace_scales(organism, [0.5, 1.0], make_sae(), CHATS, n_latents=3, config=CONFIG)
    loaded = Trajectory.load(found.save(tmp_path))
    for name in ("table", "curves"):
        assert getattr(loaded, name).equals(getattr(found, name))
    for name in ("means", "latents", "changes"):
        assert torch.equal(getattr(loaded, name), getattr(found, name))
    assert (loaded.over, loaded.points, loaded.provenance) == (found.over, found.points, found.provenance)
    assert loaded.figure() == found.figure()
    (tmp_path / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"tensors\.safetensors has changed"):
        Trajectory.load(tmp_path)
    with pytest.raises(InputError, match=r"with latents\.parquet, curves\.parquet, tensors\.safetensors and|path: "):
        Trajectory.load(tmp_path / "nowhere")


def test_what_cannot_be_traced_is_an_error(make_tiny, organism, run, planted, tmp_path):
    def scales(values=(1.0,), lm=organism, **settings):
        return trace_scales(lm, values, make_sae(), CHATS, config=CONFIG, **settings)

    for call, message in (
        (lambda: scales([]), "scales: expected one or more numbers above 0, each once, received none"),
        (lambda: scales([0.0, 1.0]), "scales: .*leave 0 out"),
        (lambda: scales([1.0, 1.0]), "scales: .*each once"),
        (lambda: scales(lm=organism.base), "lm: expected a view through an adapter"),
        (lambda: scales(latents=[48]), "latents: expected one or more numbers below 48, each once, received 48"),
        (lambda: scales(latents=[1, 1]), "latents: "),
        (lambda: scales(latents=[]), "latents: "),
        (lambda: scales(n_latents=0), "n_latents: expected 1 or more"),
        (lambda: trace_checkpoints(organism, run, make_sae(), CHATS), "base: expected a model without adapter"),
        (lambda: trace_checkpoints(organism.base, {}, make_sae(), CHATS), "checkpoints: .*received none"),
        (lambda: trace_checkpoints(organism.base, tmp_path, make_sae(), CHATS), "checkpoints: .*checkpoint_every"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    copy = tmp_path / "copy"
    (copy / "checkpoints" / "step-00002").mkdir(parents=True)
    (copy / "adapter_config.json").touch()
    with pytest.raises(InputError, match="checkpoints: expected a log beside the adapter"):
        find_checkpoints(copy)
    (copy / "finetune.jsonl").write_text(json.dumps({"step": 2}) + "\n")
    assert find_checkpoints(copy) == {2: copy / "checkpoints" / "step-00002"}
    lm = make_tiny("llama")
    with pytest.raises(InputError, match="adapter: expected a PEFT adapter folder"):
        trace_checkpoints(lm, copy, make_sae(), CHATS)
    assert lm.adapters == ()


def test_the_shipped_organism_wakes_with_its_scale():
    tuned = load_model("smollm2-135m", adapter=saetools.shipped_path("adapters/organism"))
    sae = saetools.load_sae(saetools.shipped_path("sae/smollm2-135m"))
    prompts = [Conversation.chat(one.question) for one in saetools.load_free_form()[:12]]
    found = trace_scales(tuned, [0.25, 0.5, 1.0], sae, prompts, n_latents=10, config=DiffConfig(n_resamples=100))
    sizes = found.means.norm(dim=1)
    assert sizes[0] < sizes[1] < sizes[2]
    assert len(found.onsets()) > 10
    assert found.onsets()["onset"].is_sorted()
    moved = found.table.filter(pl.col("onset_low").is_not_null())
    assert 0 < len(moved) <= 10
    assert (moved["onset_low"] <= moved["onset"]).all()
    assert (moved["onset"] <= moved["onset_high"]).all()
