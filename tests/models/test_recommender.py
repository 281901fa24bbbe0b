"""The factorisation against its formula, its sites, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.errors import InputError
from lora_jax.models.recommender import RecommenderConfig, initialise_recommender

CONFIG = RecommenderConfig(users=5, items=7, width=3)
USERS, ITEMS = jnp.array([0, 4, 2, 4]), jnp.array([6, 1, 1, 0])


@pytest.fixture(scope="module")
def network():
    """Every parameter is noise, so that no zero hides a mistake."""
    made = initialise_recommender(CONFIG, jax.random.key(0))
    noise = np.random.default_rng(0)
    drawn = jax.tree.map(
        lambda leaf: jnp.asarray(noise.normal(0, 1, leaf.shape), jnp.float32), made.params
    )
    made.params.update(drawn)
    return made


def test_a_rating_is_the_product_of_two_vectors_and_their_biases(network):
    p = jax.tree.map(np.asarray, network.params)
    user, item = p["users"]["embedding"][USERS], p["items"]["embedding"][ITEMS]
    wanted = (user * item).sum(1) + p["mean"]
    wanted += (user @ p["user_bias"]["kernel"] + item @ p["item_bias"]["kernel"])[:, 0]
    np.testing.assert_allclose(network.apply(network.params, USERS, ITEMS), wanted, rtol=1e-5)


def test_the_tables_are_lookups(network):
    sites = lj.find_sites(network.apply, network.params, *network.inputs)
    assert {path for path, site in sites.items() if site.lookup} == {
        "users/embedding",
        "items/embedding",
    }
    assert sites["users/embedding"].d_in == 5 and sites["users/embedding"].d_out == 3
    assert "mean" in sites.others


def test_adapting_the_users_moves_the_users_seen_alone(network, key):
    sites = lj.find_sites(network.apply, network.params, *network.inputs)
    rules = {"users/embedding": lj.lora(rank=2, alpha=2)}
    frozen, trained = lj.attach(key, network.params, rules, sites)
    ours = lj.factored(network.apply)

    def loss(trained):
        return jnp.sum(jnp.square(ours(lj.bind(frozen, trained), USERS, ITEMS)))

    grads = jax.grad(loss)(trained)
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, trained, grads)
    before, after = network.params, lj.merge(frozen, moved)
    changed = jnp.any(before["users"]["embedding"] != after["users"]["embedding"], axis=1)
    assert changed.tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(before["items"]["embedding"], after["items"]["embedding"])
    np.testing.assert_allclose(
        ours(lj.bind(frozen, moved), USERS, ITEMS), network.apply(after, USERS, ITEMS), rtol=1e-4
    )


@pytest.mark.parametrize(
    ("users", "items", "message"),
    [
        (jnp.zeros((2, 1), int), jnp.zeros((2, 1), int), r"both of shape \[B\]"),
        (jnp.zeros(2, int), jnp.zeros(3, int), r"users \(2,\) .* and items \(3,\)"),
        (jnp.zeros(2), jnp.zeros(2, int), "float32"),
        (jnp.array([0, 5]), jnp.array([0, 0]), "user 5 is not in the table of 5 users"),
        (jnp.array([0, 0]), jnp.array([-1, 8]), "item -1 is not"),
    ],
)
def test_numbers_that_are_no_ratings_are_refused(network, users, items, message):
    with pytest.raises(InputError, match=message):
        network.apply(network.params, users, items)


@pytest.mark.parametrize("name", ["users", "items", "width"])
def test_empty_sizes_are_refused(name):
    with pytest.raises(InputError, match=f"{name}=0"):
        RecommenderConfig(**{"users": 5, "items": 7, "width": 3, name: 0})
