"""Text analysis for lexical search: from a text to the terms that are counted, as Lucene's analyzers do it.

English is analysed as Anserini does it: words, lower case, without possessive 's and stop words, and with
Porter's stemmer, which leaves words of two letters alone. The terms of "The Kettles' lids" are "kettl" and
"lid". The stop words are NLTK's, also as the beginning of a contraction ("they'd"), not Lucene's 33, which
have no "what" and "who": nDCG@10 on SQuAD's paragraphs is 0.874 with the former, and 0.856 with the latter.

All languages have in common, much as in Lucene's StandardTokenizer and CJKAnalyzer:

- Texts are brought to Unicode's form NFKC: full width, ligatures and decomposed accents do not matter.
- Combining marks are part of words. Vowel marks of Arabic and Hebrew, which most texts omit, are removed.
- Words of one letter count.
- Apostrophes inside a word are part of it: "o'neil" is a term.
- Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese, which have no spaces between words (or, in Korean,
  before particles), become overlapping pairs of letters; a letter alone stays. As a query, it is looked up in
  the pairs, too (`pairs_with`).

One thing differs from StandardTokenizer: a full stop between letters separates words, so that "adam" finds
`optax.adam`.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable

import Stemmer
from bm25s import stopwords

from retrieval_jax.data.vocabulary import valid_text

VERSION = 2  # of the rules here; a searcher's recipe names it

DEFAULT_LANGUAGE = "porter"
# NLTK's list, without the ends of "I'm" or "they've": they are no words here, but the D of "vitamin D" is.
_ENGLISH = {*stopwords.STOPWORDS_EN_PLUS} - {"d", "ll", "m", "ma", "o", "re", "s", "t", "ve", "y"}
_STOP_WORDS = {
    "porter": _ENGLISH,
    "english": _ENGLISH,
    "danish": stopwords.STOPWORDS_DANISH,
    "dutch": stopwords.STOPWORDS_DUTCH,
    "french": stopwords.STOPWORDS_FRENCH,
    "german": stopwords.STOPWORDS_GERMAN,
    "italian": stopwords.STOPWORDS_ITALIAN,
    "norwegian": stopwords.STOPWORDS_NORWEGIAN,
    "portuguese": stopwords.STOPWORDS_PORTUGUESE,
    "russian": stopwords.STOPWORDS_RUSSIAN,
    "spanish": stopwords.STOPWORDS_SPANISH,
    "swedish": stopwords.STOPWORDS_SWEDISH,
    "turkish": stopwords.STOPWORDS_TURKISH,
}
# Arabic and Hebrew vowel marks, the Arabic stretching sign, joiners and the soft hyphen, variation selectors,
# the keycap of emoji, and the dot that lower-casing leaves of a Turkish capital İ.
_DROPPED = re.compile(
    "[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0640\u064b-\u065f\u0670\u06d6-\u06ed\u00ad\u200c-\u200f"
    "\u2060\ufeff\ufe00-\ufe0f\u20e3\U000e0100-\U000e01ef]|(?<=i)\u0307"
)
# Bopomofo, kana, Han and Hangul; Thai and Lao, Burmese, Khmer.
_UNSPACED = (
    "\u3005\u3007\u3041-\u30fa\u30fc-\u318f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua960-\ua97f\uac00-\ud7ff"
    "\uf900-\ufaff\u1100-\u11ff\U00020000-\U0003ffff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
)
# Numbers with their points and commas, and words with their inner apostrophes. A mark does not begin a word.
_WORD = r"\d+(?:[.,]\d+)+|\w{letter}*(?:'\w{letter}*)*"
_CONTRACTED = re.compile("'(?:d|ll|m|re|t|ve)$")  # "they'd", "can't"; NLTK's list has a few of them
_WORDS_REMEMBERED = 1 << 18


@functools.cache
def _marks() -> str:
    """Returns the combining marks, as the inside of a regular expression's brackets."""
    return "".join(c for c in map(chr, range(0x300, 0x1F000)) if unicodedata.category(c)[0] == "M")


def languages() -> list[str]:
    """Returns the names of the languages: those of Snowball's stemmers, where "porter" is English."""
    return Stemmer.algorithms()


@functools.cache
def _unspaced_letter() -> re.Pattern[str]:
    return re.compile(f"[{_UNSPACED}][{_marks()}]*")


def pairs_with(term: str, terms: Iterable[str]) -> list[str]:
    """Returns the terms that are pairs with this one, where it is a letter of a script without spaces.

    Args:
      term: a term; one that is no such letter has no pairs.
      terms: the terms among which to look, each once.
    """
    letter = _unspaced_letter()
    if not letter.fullmatch(term):
        return []
    return [pair for pair in terms if term in pair and pair != term and term in letter.findall(pair)]


@functools.cache
def analyzer(language: str | None = DEFAULT_LANGUAGE) -> Callable[[str], list[str]]:
    """Returns the function that turns a text into its terms, in order, with repetitions.

    Args:
      language: one of `languages()`, which chooses the stemmer and, where a list is known, the stop words;
        None for neither.
    """
    stem_word = Stemmer.Stemmer(language, 0).stemWord if language else str
    stop_words = frozenset(_STOP_WORDS.get(language, ()))
    porter, english = language == "porter", language in ("porter", "english")
    letter = rf"[\w{_marks()}]"
    words = re.compile(_WORD.replace("{letter}", letter))
    ascii_words = re.compile(_WORD.replace("{letter}", r"\w"), re.ASCII)
    unspaced = re.compile(f"((?:{_unspaced_letter().pattern})+)")
    letters = _unspaced_letter()

    def stem(word: str) -> str:
        # Porter's paper takes the "s" of "OS" and all of "s"; Lucene leaves words of two letters alone.
        return word if porter and len(word) <= 2 else stem_word(word) or word

    @functools.lru_cache(_WORDS_REMEMBERED)
    def terms(word: str) -> tuple[str, ...]:
        if english:
            word = word.removesuffix("'s")
        if not word.isascii() and unspaced.search(word):
            parts = [part for part in (part.strip("'") for part in unspaced.split(word)) if part]
            if len(parts) > 1:
                return tuple(term for part in parts for term in terms(part))
            found = letters.findall(word)
            return tuple(map("".join, itertools.pairwise(found))) or (word,)
        if word in stop_words or (english and _CONTRACTED.sub("", word) in stop_words):
            return ()
        return (stem(word),)

    def analyze(text: str) -> list[str]:
        found = ascii_words.findall(text.lower()) if text.isascii() else words.findall(_normalized(text))
        return list(itertools.chain.from_iterable(map(terms, found)))

    return analyze


def _normalized(text: str) -> str:
    text = unicodedata.normalize("NFKC", valid_text(text)).lower()
    # The zero-width space separates words, in Khmer and Thai above all.
    text = text.replace("’", "'").replace("\u200b", " ")
    return unicodedata.normalize("NFC", _DROPPED.sub("", text))
