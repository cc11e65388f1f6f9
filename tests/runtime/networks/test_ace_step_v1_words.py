"""Lyrics as the vocabulary of ACE-Step v1 has them."""

import pytest
from tokenizers import Tokenizer

from atelier_runtime.networks.ace_step_v1_words import language_of, lyric_tokens, marked
from family_models.ace_step_v1 import lyric_tokenizer

ENGLISH = "round and round it goes\nwhere the river meets the sea"
GERMAN = "Über allen Gipfeln ist Ruh,\nin allen Wipfeln spürest du kaum einen Hauch"
RUSSIAN = "Выхожу один я на дорогу;\nСквозь туман кремнистый путь блестит"
FRENCH = "Sous le pont Mirabeau coule la Seine\nEt nos amours, faut-il qu'il m'en souvienne"


@pytest.mark.parametrize(
    ("line", "language", "expected"),
    [
        ("Round  and \tround", "en", "[en]round[SPACE]and[SPACE]round"),
        ('"Halt", sprach er', "de", "[de]halt,[SPACE]sprach[SPACE]er"),
        ("[Chorus - Loud]", "de", "[en][chorus[SPACE]-[SPACE]loud]"),
        ("你好 世界", "zh", "[zh-cn]ni3hao3[SPACE]shi4jie4"),
        ("我 love 你", "en", "[zh-cn]wo3[SPACE]love[SPACE]ni3"),
        ("了吗", "zh", "[zh-cn]le5ma5"),
        ("99 Luftballons", "de", "[de]99[SPACE]luftballons"),
    ],
    ids=["spaces", "quotes", "section", "chinese", "chinese among english", "neutral tone", "number"],
)
def test_a_line_is_marked_with_its_language_and_written_small(line: str, language: str, expected: str) -> None:
    assert marked(line, language) == expected


@pytest.mark.parametrize(("line", "name"), [("さくら さくら", "Japanese"), ("아리랑", "Korean")])
def test_languages_that_would_have_to_be_romanised_are_refused(line: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"the line '{line}' in {name}.*leave the line out"):
        marked(line, "en")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (ENGLISH, "en"),
        (GERMAN, "de"),
        (RUSSIAN, "ru"),
        (FRENCH, "fr"),
        ("床前明月光\n疑是地上霜", "zh"),
        ("1 2 3 …", "en"),
    ],
)
def test_the_language_is_that_of_the_whole_text(text: str, language: str) -> None:
    assert language_of(text) == language


def test_lines_end_with_a_token_and_empty_ones_are_one_alone() -> None:
    tokenizer = lyric_tokenizer()
    vocabulary: Tokenizer = tokenizer.backend_tokenizer
    names = [vocabulary.id_to_token(number) for number in lyric_tokens(tokenizer, "[verse]\nIt goes\n\n round")]
    line = ["[en]", "i", "t", "[SPACE]", "g", "o", "e", "s"]
    assert names == [
        *("[START]", "[en]", "[verse]", "[SPACE]"),
        *(*line, "[SPACE]"),
        "[SPACE]",
        *("[en]", "r", "o", "u", "n", "d", "[SPACE]"),
    ]


def test_sections_do_not_tell_the_language() -> None:
    german = lyric_tokens(lyric_tokenizer(), "[verse]\n[chorus]\n" + GERMAN)
    [mark] = lyric_tokenizer().convert_tokens_to_ids(["[de]"])
    assert german.count(mark) == 2
