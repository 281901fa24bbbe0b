"""Tables of ratings, the split at the arrival of new users, the baseline of means."""

import zipfile

import numpy as np
import pytest

from lora_jax.data.ratings import item_and_user_means, read_ratings, split_arrivals
from lora_jax.errors import InputError

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
MEMBER = "recbole/dataset_example/ml-100k/ml-100k.inter"


def table(path, *lines, header=HEADER):
    path.write_text("\n".join([header, *lines, ""]))
    return path


def draw(path, users=9, each=6):
    """User n arrives at time 100 n and rates `each` items, one a second, in any order."""
    lines = [
        f"{user}\t{(user + place) % 7}\t{1 + (user * place) % 5}\t{100 * user + place}"
        for user in range(users)
        for place in range(each)
    ]
    return read_ratings(table(path, *np.random.default_rng(0).permutation(lines)))


def test_a_table_is_read_by_its_columns(tmp_path):
    path = table(tmp_path / "a.inter", "10\t7\t3\t881250949", "9\t7\t4.5\t5\r")
    found = read_ratings(path)
    assert found.user_names == ("9", "10") and found.item_names == ("7",)
    assert found.users.tolist() == [1, 0] and found.items.tolist() == [0, 0]
    assert found.values.tolist() == [3.0, 4.5] and found.times.tolist() == [881250949, 5]
    swapped = table(
        tmp_path / "b.tsv", "5\tx\t4.5\tann\t7", header="timestamp\tmore\trating\tuser_id\titem_id"
    )
    found = read_ratings(swapped)
    assert found.user_names == ("ann",) and found.values.tolist() == [4.5]


def test_a_wheel_is_read_without_unpacking(tmp_path):
    wheel = tmp_path / "recbole.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, HEADER + "\n1\t2\t3\t4\n")
    assert len(read_ratings(wheel)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recbole.whl"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1 names no column user_id, item_id, rating, timestamp"),
        (b"user_id\titem_id\trating\n1\t2\t3\n", "names no column timestamp"),
        (HEADER.encode(), "no ratings below"),
        (HEADER.encode() + b"\n1\t2\t3\t4\n1\t2\t3\n", r"line 3 is not .*'1\\t2\\t3'"),
        (HEADER.encode() + b"\n1\t2\tgood\t4\n", "line 2 is not"),
        (HEADER.encode() + b"\n1\t2\tnan\t4\n", "line 2 is not"),
        (b"\xff\xfe", "not a readable table"),
    ],
)
def test_garbled_tables_are_refused(tmp_path, content, message):
    path = tmp_path / "x.inter"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_ratings(path)


def test_garbled_wheels_are_refused(tmp_path):
    wheel = tmp_path / "recbole.whl"
    with pytest.raises(InputError, match="no table of ratings"):
        read_ratings(wheel)
    wheel.write_bytes(b"not an archive")
    with pytest.raises(InputError, match="not a readable"):
        read_ratings(wheel)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.inter", HEADER)
    with pytest.raises(InputError, match="holds no"):
        read_ratings(wheel)


def test_new_users_are_learnt_from_their_first_ratings_alone(tmp_path):
    ratings = draw(tmp_path / "x.tsv")
    parts = split_arrivals(ratings, dev=1, test=3, first=2, seed=0)
    assert [len(part) for part in parts] == [5 * 6, 4 * 2, 1 * 4, 3 * 4]
    assert set(parts.known.users) == set(range(5))
    assert set(parts.first.users) == {5, 6, 7, 8} == set(parts.dev.users) | set(parts.test.users)
    assert not set(parts.dev.users) & set(parts.test.users)
    assert parts.known.times.max() < parts.first.times.min()
    for held_out in (parts.dev, parts.test):
        for user in set(held_out.users):
            learnt = parts.first.times[parts.first.users == user]
            assert learnt.max() < held_out.times[held_out.users == user].min()


def test_what_known_users_rate_later_is_left_out(tmp_path):
    lines = [
        "1\t1\t3\t0",
        "1\t2\t3\t50",
        "2\t1\t4\t40",
        "2\t2\t4\t41",
        "3\t1\t2\t42",
        "3\t2\t2\t43",
    ]
    ratings = read_ratings(table(tmp_path / "x.tsv", *lines))
    parts = split_arrivals(ratings, dev=1, test=1, first=1, seed=0)
    assert parts.known.times.tolist() == [0]


def test_the_split_depends_on_the_seed_alone(tmp_path):
    one, two = draw(tmp_path / "x.tsv", users=30), draw(tmp_path / "y.tsv", users=30)
    sizes = {"dev": 9, "test": 9, "first": 2}
    who = [set(split_arrivals(r, **sizes, seed=s).test.users) for r, s in [(one, 0), (two, 0)]]
    assert who[0] == who[1] != set(split_arrivals(one, **sizes, seed=1).test.users)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dev": 0, "test": 1, "first": 1}, "at least 1"),
        ({"dev": 4, "test": 5, "first": 1}, "no 'known' ratings"),
        ({"dev": 1, "test": 1, "first": 6}, "no 'dev' ratings of 54 by 9 users"),
    ],
)
def test_splits_that_leave_nothing_are_refused(tmp_path, sizes, message):
    with pytest.raises(InputError, match=message):
        split_arrivals(draw(tmp_path / "x.tsv"), **sizes, seed=0)


def test_the_baseline_of_means(tmp_path):
    lines = ["1\t1\t3\t0", "1\t2\t5\t1", "2\t1\t1\t2", "3\t2\t4\t3"]
    ratings = read_ratings(table(tmp_path / "x.tsv", *lines))
    known, first = ratings.take(ratings.users < 2), ratings.take(ratings.users == 2)
    means = item_and_user_means(known, first, shrink=0.0)
    # The items' means are 2 and 5; the new user gave one less than the second's.
    np.testing.assert_allclose(means(np.array([0, 2]), np.array([0, 0])), [2.0, 1.0])
    shrunk = item_and_user_means(known, first, shrink=1.0)
    item = 3 + 2 / 2
    np.testing.assert_allclose(shrunk(np.array([2]), np.array([1])), [item + (4 - item) / 2])


@pytest.mark.network
def test_the_published_table():
    from lora_jax.data.ratings import PACKAGE, SHA256
    from lora_jax.io.packages import fetch_package

    ratings = read_ratings(fetch_package(*PACKAGE, SHA256))
    assert (len(ratings), len(ratings.user_names), len(ratings.item_names)) == (100_000, 943, 1682)
    parts = split_arrivals(ratings, dev=100, test=200, first=10, seed=0)
    assert [len(part) for part in parts] == [66_332, 3_000, 7_629, 18_151]
