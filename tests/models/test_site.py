import random

import pytest

from saetools.errors import InputError
from saetools.models import STREAMS, Site


def test_prints_and_parses_transformer_lens_names():
    assert str(Site(15)) == "blocks.15.hook_resid_post"
    for site in (Site(layer, stream) for layer in (0, 7, 31) for stream in STREAMS):
        assert Site.parse(str(site)) == site


def test_orders_as_a_forward_pass_reaches_them():
    ordered = [Site(layer, stream) for layer in (2, 10) for stream in STREAMS]
    shuffled = random.Random(0).sample(ordered, len(ordered))
    assert shuffled != ordered
    assert sorted(shuffled) == ordered


@pytest.mark.parametrize(
    "name",
    [
        "blocks.1.resid_post",
        "blocks.-1.hook_resid_post",
        "blocks.1.hook_q",
        "xblocks.1.hook_mlp_out",
        "",
        "blocks.1.hook_mlp_out.x",
    ],
)
def test_other_names_are_errors(name):
    with pytest.raises(InputError, match="site: expected blocks"):
        Site.parse(name)


def test_bad_fields_are_errors():
    with pytest.raises(InputError, match="layer: expected 0 or more, received -1"):
        Site(-1)
