import jax
import numpy as np
import pytest

import varjax
from tests.helpers import runs
from varjax.checkpoints.class_names import ClassNames
from varjax.errors import InputError

ARTICLES = ClassNames(
    tuple("shirt bag boot dress coat sandal pullover sneaker trousers top".split())
)


@pytest.fixture(scope="module")
def model():
    model = varjax.load(runs.untrained_var())
    model.labels = ARTICLES
    return model


def test_a_printed_model_lists_its_parts_classes_and_options(model):
    text = str(model)
    assert text.startswith("VARPipeline\n")
    counts = [sum(x.size for x in jax.tree.leaves(part)) for part in model.params.values()]
    assert all(f"{count / 1e6:,.1f} M parameters" in text for count in counts)
    joined = " ".join(text.split())
    for part in ("10: 0 shirt, 1 bag", "guidance=1.5, top_k=7", "8x8 pixels, 1 channel", "depth=2"):
        assert part in joined
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
def test_labels_may_be_class_names(model):
    by_number = model.sample([1, 2], seed=3)
    np.testing.assert_array_equal(model.sample(["bag", "Boot"], seed=3), by_number)
    with pytest.raises(InputError, match=r"'bags'.*similar are 'bag' \(1\)"):
        model.sample(["bags"])


def test_a_model_with_a_refiner_keeps_its_class_names(model):
    refined = model.with_refiner(model, draft_scales=1)
    assert refined.labels is ARTICLES
    assert "refiner" in str(refined)
