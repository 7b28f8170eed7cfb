import jax.numpy as jnp
import numpy as np

from varjax.nn.class_embedding import embed_classes, no_class

EMBEDDING_NC = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


def test_a_one_hot_mix_equals_its_class():
    label_B = jnp.array([2, 0, 3])
    expected = embed_classes(label_B, EMBEDDING_NC)
    assert np.array_equal(embed_classes(jnp.eye(4)[label_B], EMBEDDING_NC), expected)


def test_weights_mix_the_embeddings():
    mixed = embed_classes(jnp.array([[0.25, 0.0, 0.75, 0.0]]), EMBEDDING_NC)
    expected = 0.25 * EMBEDDING_NC[0] + 0.75 * EMBEDDING_NC[2]
    np.testing.assert_allclose(mixed[0], expected, rtol=1e-6)


def test_no_class_has_the_same_form_as_the_labels():
    assert no_class(jnp.array([2, 0]), 3).tolist() == [3, 3]
    assert no_class(jnp.full((2, 4), 0.25), 3).tolist() == [[0, 0, 0, 1]] * 2
