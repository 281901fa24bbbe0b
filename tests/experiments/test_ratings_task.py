"""The task of ratings: pretraining, new users' first ratings, errors and their intervals."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.run import finetune
from experiments.settings import resolve
from experiments.tasks import TASKS, factors
from lora_jax.data.ratings import read_ratings
from lora_jax.errors import InputError

DEV = {"evaluate": {"split": "dev"}}


@pytest.fixture
def config(tmp_path):
    """Twenty users of two tastes, the last ten new; item n is liked by those of taste n % 2."""
    noise = np.random.default_rng(0)
    lines = ["user_id\titem_id\trating\ttimestamp"]
    for user in range(20):
        for place, item in enumerate(noise.permutation(12)):
            liked = 4 if item % 2 == user % 2 else 2
            lines.append(f"{user}\t{item}\t{liked + noise.integers(2)}\t{1000 * user + place}")
    (tmp_path / "ratings.tsv").write_text("\n".join(lines))
    return {
        "task": "ratings",
        "model": {"width": 3, "epochs": 40, "batch": 30, "learning_rate": 0.1},
        "data": {"source": str(tmp_path / "ratings.tsv"), "dev": 4, "test": 6, "first": 5},
        "targets": "users/embedding",
        "method": {"name": "lora", "rank": 1, "alpha": 1.0},
        "train": {"steps": 40, "batch": 20, "learning_rate": 0.1},
    }


def test_first_ratings_tell_a_users_taste(config, tmp_path, capsys):
    result = finetune(config, tmp_path / "run")
    assert result.parameters == 20 + 3
    assert result.after.score.value < 0.8 * result.before.score.value
    assert result.after.score.low < result.after.score.value < result.after.score.high
    assert result.after.score.total == 6 * 7
    said = capsys.readouterr().out
    assert "120 pretrained on; 50 first ones" in said and "42 later ones of 6 of them" in said
    assert "RMSE less that before training: -" in said
    assert "RMSE less that item and user means: -" in said


def test_new_users_start_as_the_mean_user(config):
    task = TASKS["ratings"](resolve(config))
    table = np.asarray(task.params["users"]["embedding"])
    np.testing.assert_allclose(table[10:], np.broadcast_to(table[:10].mean(0), (10, 3)), atol=1e-6)
    assert np.ptp(table[:10], axis=0).max() > 0.1


def test_batches_hold_first_ratings_alone_and_follow_from_the_step(config):
    task, again = (TASKS["ratings"](resolve(config)) for _ in range(2))
    seen = [task.batches(step) for step in range(5)]
    pairs = {(u, i) for batch in seen for u, i in zip(batch["users"], batch["items"], strict=True)}
    assert len(pairs) == 50 and {user for user, _ in pairs} == set(range(10, 20))
    for name, column in again.batches(3).items():
        np.testing.assert_array_equal(column, seen[3][name])
    total, weight = task.loss(task.params, seen[0])
    errors = task.apply(task.params, seen[0]["users"], seen[0]["items"]) - seen[0]["targets"]
    assert float(weight) == 20
    np.testing.assert_allclose(total, jnp.sum(errors**2), rtol=1e-6)


def test_pretraining_is_the_same_twice(config):
    known = read_ratings(config["data"]["source"])
    options = factors.ModelSettings(width=2, epochs=2, batch=50)
    one, two = (factors.pretrain(known, options, seed=0).params for _ in range(2))
    np.testing.assert_array_equal(one["items"]["embedding"], two["items"]["embedding"])


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("model", {"source": "hf://x/y"}, "config.model.source .*leave it empty"),
        ("model", {"width": 0}, "config.model.width is 0"),
        ("data", {"first": 0}, "config.data.first is 0"),
        ("model", {"learning_rate": 1e30}, "lower config.model.learning_rate"),
        ("data", {"shrink": -1.0}, "config.data.shrink is -1.0"),
        ("data", {"dev": 1}, "an interval over 1 group"),
        ("data", {"dev": 14}, "config.data: .*no 'known' ratings"),
        ("data", {"source": "nowhere.tsv"}, "no table of ratings 'nowhere.tsv'"),
    ],
)
def test_mistakes_are_named(config, section, changes, message):
    with pytest.raises(InputError, match=message):
        TASKS["ratings"](resolve(config | {section: config[section] | changes, **DEV}))
