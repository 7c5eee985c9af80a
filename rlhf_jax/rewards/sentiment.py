"""How positive a text is, by published rules: VADER (Hutto & Gilbert 2014)."""

import functools
import re
from typing import NamedTuple

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer, SentiText


def compound(texts: list[str]) -> list[float]:
    """VADER's compound score of each text, in [-1, 1]; 0 where no word is in its lexicon."""
    analyzer = _analyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


@functools.cache
def _analyzer() -> "_Analyzer":
    """Made once, at the first use: it reads a lexicon of 7,500 words."""
    return _Analyzer()


class _Analyzer(SentimentIntensityAnalyzer):
    """VADER's, which also gives the valence that each word is counted with."""

    def valences(self, text: str) -> list[float]:
        """The valence of each word, after the rules."""
        return self.polarity_scores(text)["valences"]

    def score_valence(self, sentiments, text):
        return super().score_valence(sentiments, text) | {"valences": sentiments}


class Word(NamedTuple):
    """A word that VADER counts, text[start:end]."""

    start: int
    end: int
    own: float  # its valence in the lexicon, in [-4, 4]; 0 where only an idiom counts
    counted: float  # the same after the rules: negation, degree words, capitals, "but"


def words(text: str) -> list[Word]:
    """The words that VADER counts, in order. The compound score is made of their `counted` and of punctuation."""
    analyzer = _analyzer()
    spelled: list[str] = []
    places: list[int] = []  # VADER reads an emoji as its description; places[i] is where character i comes from
    for i, character in enumerate(text):
        name = analyzer.emojis.get(character)
        piece = character if name is None else f" {name}" if spelled and spelled[-1] != " " else name
        spelled += piece
        places += [i] * len(piece)
    read = "".join(spelled)
    found = []
    parts = zip(re.finditer(r"\S+", read), SentiText(read).words_and_emoticons, analyzer.valences(text), strict=True)
    for match, word, counted in parts:
        own = analyzer.lexicon.get(word.lower(), 0.0)
        if own or counted:
            found.append(Word(places[match.start()], places[match.end() - 1] + 1, own, float(counted)))
    return found
