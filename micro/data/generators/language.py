"""Grammar, wording and the meaning of words."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from micro.data.generators.scene import Slots, Template

_VERBS = tuple(
    line.split()
    for line in """
carry carries carried carrying
hide hides hid hiding
find finds found finding
bring brings brought bringing
take takes took taking
draw draws drew drawing
choose chooses chose choosing
buy buys bought buying
lose loses lost losing
keep keeps kept keeping
sell sells sold selling
throw throws threw throwing
""".strip().splitlines()
)
_SYNONYMS = (
    "big large;small little;quick fast;begin start;glad happy;silent quiet;brave bold;clever smart;"
    "wealthy rich;difficult hard;strange odd;correct right;repair mend;choose select;shut close;reply answer"
)
_OPPOSITES = (
    "early late;heavy light;narrow wide;ancient modern;empty full;rough smooth;public private;gentle harsh;"
    "cheap expensive;shallow deep;guilty innocent;rare common;absent present;sharp blunt;noisy silent;tidy messy"
)
_ADJECTIVES = (
    "quick quicker quickly;slow slower slowly;bright brighter brightly;warm warmer warmly;neat neater neatly;"
    "loud louder loudly;sweet sweeter sweetly;strong stronger strongly;clear clearer clearly;soft softer softly"
)
_RHYMES = (
    "box fox;bell shell;key sea;book hook;spoon moon;mug jug;ball wall;bowl coal;case lace;tin bin;bag flag;shirt skirt"
)
_DOUBLED = (
    "running run n;sitting sit t;swimming swim m;stopping stop p;"
    "planning plan n;hugging hug g;getting get t;robbing rob b"
)


def _verb(rng: Random, _: Slots) -> Slots:
    base, third, past, going = rng.choice(_VERBS)
    return {"verb": base, "third": third, "past": past, "going": going}


def _pair(table: str, first: str, second: str, third: str = "") -> Callable[[Random, Slots], Slots]:
    names = [n for n in (first, second, third) if n]
    rows = [dict(zip(names, entry.split(), strict=True)) for entry in table.split(";")]
    return lambda rng, _: dict(rng.choice(rows))


_synonym = _pair(_SYNONYMS, "word", "twin")
_opposite = _pair(_OPPOSITES, "word", "opposite")
_adjective = _pair(_ADJECTIVES, "base", "more", "adverb")
_rhyme = _pair(_RHYMES, "word", "echo")
_doubled = _pair(_DOUBLED, "long", "base", "letter")


def _letters(_: Random, scene: Slots) -> Slots:
    word = str(scene["other"])
    return {"first": word[0], "last": word[-1]}


def _article(_: Random, scene: Slots) -> Slots:
    colour, thing = str(scene["colour"]), str(scene["thing"])
    vowel = colour[0] in "aeiou"
    return {
        "article": "an" if vowel else "a",
        "wrong": "a" if vowel else "an",
        "sound": "vowel" if vowel else "consonant",
        "phrase": f"{colour} {thing}",
    }


TRAIN = (
    Template("plural", 'What is the plural of "{thing}"?', 'the noun "{thing}" has the plural "{things}".'),
    Template(
        "past",
        'Put this into the past tense: "{a} and {b} {verb} the {things}."',
        'in the past tense, the sentence reads: "{a} and {b} {past} the {things}."',
        _verb,
    ),
    Template(
        "synonym",
        'Give another word for "{word}".',
        'a word with nearly the same meaning as "{word}" is "{twin}".',
        _synonym,
    ),
    Template(
        "opposite", 'What is the opposite of "{word}"?', 'the opposite of the word "{word}" is "{opposite}".', _opposite
    ),
    Template(
        "passive",
        'Put this into the passive: "{a} moved the {thing}."',
        'in the passive voice, the sentence becomes: "the {thing} was moved by {a}."',
    ),
    Template(
        "letters",
        'How is the word "{other}" written?',
        'the word "{other}" begins with the letter {first} and ends with the letter {last}.',
        _letters,
    ),
    Template(
        "pronoun",
        'Who is meant by "{a_his}" in "{a} lost {a_his} {thing}"?',
        'in "{a} lost {a_his} {thing}", the pronoun "{a_his}" stands for {a}.',
    ),
    Template(
        "agreement",
        'Is it "the {k} {things} is" or "the {k} {things} are"?',
        'the subject "the {k} {things}" is plural, so the verb must be "are".',
    ),
    Template(
        "question",
        'Turn this into a question: "{a} likes the {thing}."',
        'as a question, this reads: "does {a} like the {thing}?"',
    ),
    Template(
        "article",
        'Which article goes with "{phrase}"?',
        'the correct form is "{article} {phrase}", because a {sound} follows, not "{wrong} {phrase}".',
        _article,
    ),
    Template(
        "comparative",
        'What is the comparative of "{base}"?',
        'the adjective "{base}" has the comparative form "{more}".',
        _adjective,
    ),
    Template(
        "adverb",
        'Make an adverb of "{base}".',
        'with the ending "-ly", the adjective "{base}" turns into the adverb "{adverb}".',
        _adjective,
    ),
    Template(
        "shorter",
        'Say this in fewer words: "It was {a} who brought the {things} on {day}."',
        'a shorter wording is: "{a} brought the {things} on {day}."',
    ),
    Template(
        "preposition",
        'What kind of word is "in" in "the {thing} in the {box}"?',
        'in the phrase "the {thing} in the {box}", the word "in" is a preposition.',
    ),
)

TEST = (
    Template(
        "negation",
        'Negate this: "{b} {third} the {things}."',
        'the negated sentence is: "{b} does not {verb} the {things}."',
        _verb,
    ),
    Template(
        "future",
        'Put this into the future: "{b} {third} {k} {things}."',
        'with "will", the statement reads: "{b} will {verb} {k} {things}."',
        _verb,
    ),
    Template(
        "doubled",
        'How does one spell "{long}"?',
        'the form "{long}" is spelt with a double {letter}, unlike its stem "{base}".',
        _doubled,
    ),
    Template(
        "rhyme",
        'What rhymes with "{word}"?',
        '"{word}" rhymes with "{echo}", since both end in the same sound.',
        _rhyme,
    ),
    Template(
        "reported",
        'Report this: {a} said, "I am {going} the {thing}."',
        "in reported speech one writes: {a} said that {a_he} was {going} the {thing}.",
        _verb,
    ),
    Template(
        "adjectives",
        'Is it "the {colour} big {thing}" or "the big {colour} {thing}"?',
        'an adjective of size comes before one of colour, hence "the big {colour} {thing}".',
    ),
    Template(
        "object",
        'What is the direct object of "{a} {third} the {thing}"?',
        'here "{a}" is the subject, "{third}" the verb, and "the {thing}" the direct object.',
        _verb,
    ),
    Template(
        "possessive",
        'How does one write "the {thing} of {b}" with an apostrophe?',
        'with an apostrophe and an s, the same phrase is written "{b}\'s {thing}".',
    ),
    Template(
        "perfect",
        'Put "{a} {third} the {thing}" into the past perfect with "already".',
        'the past perfect puts "had" in front: "{a} had already started {going} the {thing}."',
        _verb,
    ),
    Template(
        "compound",
        'Which words are in the compound "{place} {thing}"?',
        'the compound "{place} {thing}" joins two nouns, of which the last, "{thing}", decides the meaning.',
    ),
)
