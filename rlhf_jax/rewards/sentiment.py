"""How positive a text is, by published rules: VADER (Hutto & Gilbert 2014)."""

import functools

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


def compound(texts: list[str]) -> list[float]:
    """VADER's compound score of each text, in [-1, 1]; 0 where no word is in its lexicon."""
    analyzer = _analyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


@functools.cache
def _analyzer() -> SentimentIntensityAnalyzer:
    """Made once, at the first use: it reads a lexicon of 7,500 words."""
    return SentimentIntensityAnalyzer()
