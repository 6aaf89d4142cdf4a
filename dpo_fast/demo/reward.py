"""The ground-truth reward of the demo: how positive a text is, by a published sentiment lexicon.

VADER (Hutto & Gilbert 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text") sums
the valences of a text's words, with rules for negation and emphasis, and squashes the sum to the compound score in
[−1, 1]. It stands where the DPO paper's controlled-sentiment task (arXiv 2305.18290, section 6.1) has a sentiment
classifier.
"""

from __future__ import annotations

import functools
from typing import Any


def sentiment(texts: list[str]) -> list[float]:
    """VADER's compound score of each text, in [−1, 1]: negative … neutral (0) … positive.

    Raises:
        ImportError: the packages of `pip install "dpo-fast[demo]"` are missing.
    """
    analyzer = _analyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ImportError(
            'The demo\'s reward needs the package "vaderSentiment": run  pip install "dpo-fast[demo]"'
        ) from error
    return SentimentIntensityAnalyzer()
