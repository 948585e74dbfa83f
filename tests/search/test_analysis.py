"""What a text's terms are: by Porter's paper, by Unicode's forms, and over scripts without spaces."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_jax.search.analysis import analyzer, languages, pairs_with


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        # Porter 1980, "An algorithm for suffix stripping": examples of its steps.
        ("caresses ponies cats", ["caress", "poni", "cat"]),
        ("plastered motoring hopping", ["plaster", "motor", "hop"]),
        ("relational conditional vietnamization", ["relat", "condit", "vietnam"]),
        ("revival allowance adjustment probate", ["reviv", "allow", "adjust", "probat"]),
        ("The Kettles' lids, and Peter’s", ["kettl", "lid", "peter"]),
        ("Don't you know what you've been?", ["know"]),
        ("vitamin D in C++", ["vitamin", "d", "c"]),
        ("optax.adam 1,000.5 jax_platforms", ["optax", "adam", "1,000.5", "jax_platform"]),
        # Words of two letters are not stemmed, as in Lucene's PorterStemmer; no term is empty.
        ("U.S. fish", ["u", "s", "fish"]),
        ("S&P 500's", ["s", "p", "500"]),
        ("OS JS CS C US MS", ["os", "js", "cs", "c", "us", "ms"]),
        # Possessives, contractions of stop words, and other apostrophes.
        ("it's don't can't they’d I'm we'll", []),
        ("O'Neil's rock'n'roll, all'italiana", ["o'neil", "rock'n'rol", "all'italiana"]),
        ("", []),
        ("!? …", []),
    ],
)
def test_english(text: str, terms: list[str]):
    assert analyzer()(text) == terms


# A query, and a passage with its words.
FINDS = [
    ("中国的首都北京", "北京是中华人民共和国的首都，也是全国的政治中心。"),
    ("金融中心", "上海是中国最大的城市，也是重要的金融中心。"),
    ("日本の首都", "東京は日本の首都であり、世界最大の都市圏を持つ。"),
    ("富士山", "富士山は日本で最も高い山である。"),
    ("대한민국 수도 서울", "서울은 대한민국의 수도이다."),
    ("हिन्दी राजभाषा", "हिन्दी भारत की राजभाषा है।"),
    ("เมืองหลวงของประเทศไทย", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย"),
    ("القاهرة عاصمة مصر", "القاهِرَة عاصِمة مِصر"),
    ("שלום", "שָׁלוֹם"),
    ("cafe\u0301 Orle\u0301ans", "Le café est servi à Orléans chaque matin"),
    ("istanbul", "İstanbul Boğazı iki kıtayı ayırır"),
    ("fullwidth", "Ｆｕｌｌｗｉｄｔｈ ｌｅｔｔｅｒｓ"),
    ("می‌خواهم", "میخواهم"),
    ("ខ្មែរ", "ភាសា\u200bខ្មែរ"),
    ("葛\U000e0100飾区", "葛飾区の駅"),
    ("1️⃣", "1 fish"),
]


@pytest.mark.parametrize(("query", "passage"), FINDS)
def test_half_of_a_querys_terms_are_in_its_passage(query: str, passage: str):
    terms, found = analyzer()(query), set(analyzer()(passage))
    assert sum(term in found for term in terms) >= len(terms) / 2 > 0


def test_scripts_without_spaces_become_pairs_of_letters():
    assert analyzer()("Python言語を 字") == ["python", "言語", "語を", "字"]
    assert analyzer()("日本語'test, test'日本's 日'本") == [
        "日本",
        "本語",
        "test",
        "test",
        "日本",
        "日",
        "本",
    ]
    # A mark stays with its letter; Devanagari has spaces, and its words stay whole.
    assert analyzer()("ที่นี่") == ["ที่นี่"]
    assert analyzer()("दिल्ली") == ["दिल्ली"]


def test_pairs_with_a_letter_have_it_with_its_marks():
    terms = ["นที่", "ที่น", "ทน", "日本", "日", "ab", "a"]
    assert pairs_with("ที่", terms) == ["นที่", "ที่น"]
    assert pairs_with("ท", terms) == ["ทน"]
    assert pairs_with("日", terms) == ["日本"]
    assert pairs_with("a", terms) == pairs_with("日本", terms) == pairs_with("", terms) == []


def test_marks_and_selectors_alone_are_no_terms():
    assert analyzer()("❤️ heart ´ \u0301 ☀️\u20e3") == ["heart"]


def test_a_zero_width_space_separates_words_and_a_joiner_does_not():
    assert analyzer()("foo\u200bbar") == ["foo", "bar"]
    assert analyzer()("foo\u200dbar soft\u00adware") == ["foobar", "softwar"]


def test_languages_are_snowballs():
    assert analyzer("german")("Die Häuser und Gärten") == ["haus", "gart"]
    assert analyzer("french")("continuellement") == ["continuel"]
    assert analyzer("finnish")("taloissa") == ["talo"]  # without stop words
    assert analyzer(None)("The Houses") == ["the", "houses"]
    assert {"porter", "english", "arabic", "hindi"} <= set(languages())


@given(st.text(max_size=30), st.text(max_size=30))
def test_forms_of_unicode_do_not_matter_and_parts_of_a_text_stand_alone(one: str, other: str):
    analyze = analyzer(None)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert analyze(unicodedata.normalize(form, one)) == analyze(one)
    assert analyze(f"{one}\n{other}") == analyze(one) + analyze(other)


# Apostrophes, ends of words, marks, letters without spaces, and any other character.
TEXTS = st.lists(
    st.sampled_from([*"s'’_.1日ท", "'s", "s ", "cats", "\u200b", "\ufe0f", "\u0e31"]) | st.text(max_size=4)
)


@given(TEXTS.map("".join), st.sampled_from([None, *languages()]))
def test_no_term_is_empty_and_a_word_outside_the_stop_words_has_one(text: str, language: str | None):
    analyze = analyzer(language)
    assert all(analyze(text))
    assert analyze(f"{text} zyzzyva")[:-1] == analyze(text)
