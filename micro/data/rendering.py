"""A chat template applied to a conversation, with the exact place of every message in the text it renders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, proxy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Separators that the official collator inserts, by family (model.md 8.3). Needed only to do with one inside a user's
# text what the official code does with it, under special_text="special".
SEPARATORS = ("<|reserved_special_token_242|>", "<|extra_id_1|>", "<file_sep>", "<|file_sep|>")
_PRIVATE_USE = range(0xE000, 0xF8FF)


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation; all places are offsets into `text`.

    contents: (start, end) of each message; literals: (start, end) of the template's own text before each message, and
    after the last; cuts: where the marks stood, ascending.
    """

    text: str
    contents: list[tuple[int, int]]
    cuts: list[int]
    literals: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that cuts the text before merges."""

    text: str
    id: int
    lstrip: bool
    rstrip: bool


class Renderer:
    """What `encode` needs to know of one tokenizer's chat template and added tokens. Kept as long as the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise TypeError(
                f"encode: {name} is not a fast tokenizer; character offsets are needed (use tokenizer.json)"
            )
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"encode: the tokenizer {name!r} has no chat template; set tokenizer.chat_template, or take the "
                "tokenizer of the instruction-tuned model"
            )
        self._tokenizer: Any = proxy(
            tokenizer
        )  # the renderer is kept as long as the tokenizer, not the other way round
        self._name = name
        self._skeletons: dict[tuple[tuple[str, ...], str], list[str]] = {}
        self._response: dict[str, str] = {}
        self._plain: Any = None
        self.added = {
            token.content: AddedToken(token.content, index, token.lstrip, token.rstrip)
            for index, token in tokenizer.added_tokens_decoder.items()
        }
        # Longest first: the tokenizer takes the longest of the tokens that begin at the same place.
        longest = sorted(self.added, key=len, reverse=True)
        self.added_pattern = re.compile("|".join(map(re.escape, longest)) or r"(?!)")
        self.separator = next((self.added[s].id for s in SEPARATORS if s in self.added), None)

    def apply(self, messages: list[dict[str, str]], date: str, *, prompt: bool = False) -> str:
        """The template's text. date: "today" leaves the date to the template, else it is `date_string`."""
        given = {} if date == "today" else {"date_string": date}
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **given)
        assert isinstance(text, str)
        return text

    def response_template(self, date: str) -> str:
        """The text that ends the prompt: what the generation prompt adds, without the white space around it, or the
        added token that holds it.
        """
        if date not in self._response:
            turn = [{"role": "user", "content": "x"}]
            bare, asked = self.apply(turn, date), self.apply(turn, date, prompt=True)
            found = asked[len(bare) :].strip() if asked.startswith(bare) else ""
            if not found:
                raise ValueError(
                    f"encode: the chat template of {self._name!r} adds no generation prompt, so the answer's start "
                    "is not known; give response_template"
                )
            # The words may stand in one added token together with the line breaks around them (OLMo-2, model.md 8.3).
            tokens = (m[0] for m in self.added_pattern.finditer(asked) if m.end() > len(bare) and found in m[0])
            self._response[date] = next(tokens, found)
        return self._response[date]

    def render(self, messages: list[dict[str, str]], date: str, cuts: list[int]) -> Rendered:
        """The conversation with the place of every message, and of `cuts`: ascending offsets into the last message.

        Marks stand at the cuts while the template is applied, as separators do officially, so whatever the template
        does to the text (trimming) it does as officially. Raises ValueError where the template changes the messages.
        """
        mark, edge = self._unused(messages)
        last = messages[-1]["content"]
        marked = mark.join(last[a:b] for a, b in zip([0, *cuts], [*cuts, len(last)], strict=True))
        text = self.apply([*messages[:-1], {**messages[-1], "content": marked}], date)
        literals = self._skeleton(tuple(m["role"] for m in messages), date, edge)
        contents = [*(m["content"] for m in messages[:-1]), marked]
        places, spaces = self._locate(text, literals, contents)
        return _without_marks(text, places, spaces, mark)

    def _unused(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """Two private-use characters that occur in no message."""
        seen = set().union(*(m["content"] for m in messages))
        free = (chr(c) for c in _PRIVATE_USE if chr(c) not in seen)
        try:
            return next(free), next(free)
        except StopIteration:
            raise ValueError("encode: the text uses every private-use character; no mark is left") from None

    def _skeleton(self, roles: tuple[str, ...], date: str, edge: str) -> list[str]:
        """The template's own text around such messages: one piece before each message, one after the last."""
        key = (roles, date)
        if date == "today" or key not in self._skeletons:
            text = self.apply([{"role": r, "content": f"{edge}{i}{edge}"} for i, r in enumerate(roles)], date)
            pieces = re.split(f"{edge}\\d+{edge}", text)
            if len(pieces) != len(roles) + 1:
                raise ValueError(
                    f"encode: the chat template of {self._name!r} does not show every message once ({' '.join(roles)})"
                )
            self._skeletons[key] = pieces
        return self._skeletons[key]

    def _locate(
        self, text: str, literals: list[str], contents: list[str]
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        at, places, spaces = 0, [], []
        for literal, follows, content in zip(literals, literals[1:], contents, strict=False):
            if not text.startswith(literal, at):
                break
            spaces.append((at, at + len(literal)))
            at += len(literal)
            shown = next((c for c in _trimmings(content) if text.startswith(c + follows, at)), None)
            if shown is None:
                break
            places.append((at, at + len(shown)))
            at += len(shown)
        spaces.append((at, at + len(literals[-1])))
        if len(places) != len(contents) or spaces[-1][1] != len(text):
            raise ValueError(
                f"encode: the chat template of {self._name!r} changes message texts beyond trimming; cannot tell where "
                f"they stand in the text it renders (message {len(places)})"
            )
        return places, spaces

    def plain_ids(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of a text in which no added token is recognised."""
        if self._plain is None:
            self._plain = self._without_added()
        encoding = self._plain.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _without_added(self) -> Any:
        import json

        from tokenizers import Tokenizer

        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        state.update(added_tokens=[], truncation=None, padding=None)
        return Tokenizer.from_str(json.dumps(state))

    def wrapping(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer itself puts before and after a text (a BOS with Llama)."""
        bare = self._tokenizer("a", add_special_tokens=False).input_ids
        full = self._tokenizer("a", add_special_tokens=True).input_ids
        at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return full[:at], full[at + len(bare) :]


def _trimmings(content: str) -> list[str]:
    return [content, content.strip(), content.lstrip(), content.rstrip()]


def _without_marks(text: str, places: list[tuple[int, int]], spaces: list[tuple[int, int]], mark: str) -> Rendered:
    pieces = text.split(mark)
    cuts, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        cuts.append(at)
    start, end = places[-1]
    shift = len(cuts)  # marks stand in the last message only: what follows moves to the left by all of them
    tail, last = (start, end - shift), spaces[-1]
    return Rendered("".join(pieces), [*places[:-1], tail], cuts, [*spaces[:-1], (last[0] - shift, last[1] - shift)])


_renderers: WeakKeyDictionary[Any, tuple[object, Renderer]] = WeakKeyDictionary()


def renderer_for(tokenizer: PreTrainedTokenizerFast) -> Renderer:
    """The renderer of a tokenizer, made anew when its template or its added tokens have changed."""
    state = (getattr(tokenizer, "chat_template", None), len(tokenizer) if hasattr(tokenizer, "__len__") else 0)
    known = _renderers.get(tokenizer)
    if known is not None and known[0] == state:
        return known[1]
    renderer = Renderer(tokenizer)
    _renderers[tokenizer] = (state, renderer)
    return renderer
