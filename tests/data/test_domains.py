"""Four kinds of sentences with labels of one meaning."""

import pytest
from test_reviews import sdist

from lora_jax.data.domains import DOMAINS, read_domain
from lora_jax.errors import InputError

TABLE = b"1_1\t2.5\tSo happy.\r\n1_2\t0.3\tA fact.\r\n1_3\t-1.5\tOh no\r\n"


@pytest.mark.parametrize("domain", DOMAINS)
def test_sentences_come_with_labels(tmp_path, domain):
    path = sdist(tmp_path, TABLE, name=DOMAINS[domain])
    assert read_domain(path, domain) == [("So happy.", "positive"), ("Oh no", "negative")]
    assert [label for _, label in read_domain(path, domain, threshold=0.0)][1] == "positive"


def test_what_is_not_there_is_named(tmp_path):
    path = sdist(tmp_path, TABLE, name=DOMAINS["nyt"])
    with pytest.raises(InputError, match="no domain 'news'; there are movie"):
        read_domain(path, "news")
    with pytest.raises(InputError, match="holds no 'tweets"):
        read_domain(path, "tweets")
    with pytest.raises(InputError, match=r"of nyt is rated beyond \+-3"):
        read_domain(path, "nyt", threshold=3.0)


@pytest.mark.network
def test_the_published_archive():
    from lora_jax.data.reviews import PACKAGE, SHA256
    from lora_jax.io.packages import fetch_package

    path = fetch_package(*PACKAGE, SHA256, kind="sdist")
    found = {domain: read_domain(path, domain) for domain in DOMAINS}
    assert [len(rows) for rows in found.values()] == [10_043, 3_362, 2_943, 2_788]
    positive = [sum(row.completion == "positive" for row in rows) for rows in found.values()]
    assert positive == [4_982, 2_300, 1_725, 1_100]
