"""Lyrics to the tokens of ACE-Step v1: each line with a mark of its language, lower case, Chinese in pinyin.

The model is told the language of every line. That of the whole text is guessed, and a line with Chinese characters is Chinese. Numbers
and abbreviations are left as they are written, where the maker's code spells them. Japanese and Korean are refused: the maker's
romanisation of neither is here. Facts: https://github.com/ace-step/ACE-Step, `lyric_tokenizer.py` and `text2music_dataset.py`.
"""

import re
from functools import cache
from typing import Any

START, LINE_END, SPACE = "[START]", "[SPACE]", "[SPACE]"
UNSUNG = [0]
"""Of a piece without lyrics: a token that is not to be seen."""
LANGUAGES = ("en", "de", "fr", "es", "it", "pt", "pl", "tr", "ru", "cs", "nl", "ar", "zh", "hu", "hi")
MARKS = {"zh": "zh-cn"}
"""The vocabulary's mark of a language, where that is not its code."""
SECTION = re.compile(r"\[.*?\]")
"""What a line begins with that names a part of the song, such as `[chorus]`."""
CHINESE = re.compile(r"[\u4e00-\u9fff]")
REFUSED = {"Japanese": re.compile(r"[\u3040-\u30ff]"), "Korean": re.compile(r"[\uac00-\ud7af]")}


def lyric_tokens(tokenizer: Any, lyrics: str) -> list[int]:
    """Tokens of all lines, each with one of its end. Raises ValueError for a language that cannot be told."""
    start, end = tokenizer.convert_tokens_to_ids([START, LINE_END])
    language = language_of(SECTION.sub(" ", lyrics))
    tokens = [start]
    for line in (line.strip() for line in lyrics.split("\n")):
        if line:
            tokens += tokenizer(marked(line, language), add_special_tokens=False).input_ids
        tokens.append(end)
    return tokens


def marked(line: str, language: str) -> str:
    """The line as the vocabulary has it, `language` that of the whole text."""
    for name, characters in REFUSED.items():
        if characters.search(line):
            raise ValueError(
                f"the lyrics have the line {line[:40]!r} in {name}, which ACE-Step v1 is told in Latin letters by a "
                "tool that is not here; leave the line out, or write it in Latin letters"
            )
    if SECTION.match(line):
        language = "en"
    elif CHINESE.search(line):
        language = "zh"
    text = " ".join(line.replace('"', "").lower().split())
    if language == "zh":
        from pypinyin import Style, pinyin

        text = "".join(sound for [sound] in pinyin(text, style=Style.TONE3, neutral_tone_with_five=True))
    return f"[{MARKS.get(language, language)}]{text}".replace(" ", SPACE)


def language_of(text: str) -> str:
    """The likeliest of `LANGUAGES`; English where there are no letters."""
    if not any(letter.isalpha() for letter in text):
        return "en"
    language: str = _identifier().classify(text)[0]
    return language


@cache
def _identifier() -> Any:
    """The model of languages, read once: it takes half a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(list(LANGUAGES))
    return identifier
