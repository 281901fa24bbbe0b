"""One question, four kinds of text: sentiment of film reviews, tweets, product reviews, editorials.

Twenty readers rated every sentence on one scale (`lora_jax.data.reviews`), so that a classifier
trained on one kind can be measured on the others: domain shift with the labels' meaning held.
"""

from pathlib import Path

from lora_jax.data.examples import Example
from lora_jax.data.reviews import rated_texts
from lora_jax.errors import InputError

DOMAINS = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
}
LABELS = ("negative", "positive")


def read_domain(sdist: str | Path, domain: str, *, threshold: float = 0.5) -> list[Example]:
    """Read one domain's sentences rated beyond +-`threshold`, in the order of the file.

    `sdist` is the vaderSentiment 3.3.2 source archive. An example's prompt is the bare sentence,
    its completion one of `LABELS`. At 0.5: movie 10,043 sentences (50 % positive), tweets 3,362
    (68 %), amazon 2,943 (59 %), nyt 2,788 (39 %). InputError for an unknown domain, a threshold
    that leaves nothing, or an archive that cannot be read.
    """
    if domain not in DOMAINS:
        raise InputError(f"no domain {domain!r}; there are {', '.join(DOMAINS)}")
    examples = [
        Example(text, LABELS[rating > 0])
        for rating, text in rated_texts(sdist, DOMAINS[domain])
        if abs(rating) > threshold
    ]
    if not examples:
        raise InputError(f"no sentence of {domain} is rated beyond +-{threshold}; lower it")
    return examples
