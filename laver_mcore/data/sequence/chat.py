"""A chat template as a list of pieces: where its literal text, special tokens and the turns' own text stand.

The template is rendered with a mark in the place of every turn's text, so what a turn says cannot change the structure
of the prompt, and nothing has to be known of any template: which tokens begin and end a turn, where a system turn goes,
what is trimmed (but a template cannot trim across a turn that says nothing). What is learned of an answer is found from
it too: all that the model has to write after the generation prompt, up to the special token that ends its turn.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from laver_mcore.data.errors import DataError

_MARK = re.compile("\ue000(\\d+)\ue001")
_LOOKS_SPECIAL = re.compile(r"<\|[^<>|]*\|>")
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
"""transformers' own tags around answers; here answers are found without."""
_CONSTANTS: Mapping[str, Any] = {
    "tools": None,
    "documents": None,
    "enable_thinking": False,  # Qwen3: data have no reasoning in front of their answers
    "date_string": "26 Jul 2024",  # Llama 3.1 writes the day; a dialogue is to be the same tokens every day
}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of a prompt: a special token, literal text, the text of a turn, or an end of what is learned."""

    kind: Literal["special", "text", "turn", "learn", "stop"]
    token: int = -1
    text: str = ""
    turn: int = -1


@dataclass(frozen=True)
class Slot:
    """A turn without its text: role, and the white space around the text, which templates may trim."""

    role: str
    before: str = ""
    after: str = ""


def cut(role: str, texts: Sequence[str]) -> tuple[Slot, list[str]]:
    """The slot of a turn, and its texts (between images, if it has any) without the white space around the whole."""
    first = texts[0].lstrip()
    found = [first, *texts[1:]]
    last = found[-1]
    found[-1] = last.rstrip()
    return Slot(role, texts[0][: len(texts[0]) - len(first)], last[len(found[-1]) :]), found


class ChatFormat:
    """A template over a tokenizer's special tokens (their text -> id); `names` are its variables, such as `bos_token`.

    Raises DataError for a template that cannot be read, and for one that ends answers with no special token.
    """

    def __init__(
        self, template: str, special: Mapping[str, int], names: Mapping[str, str], where: object
    ) -> None:
        self.template = template
        self._special, self.names, self._where = dict(special), dict(names), where
        texts = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _refuse
        try:
            self._compiled = environment.from_string(_GENERATION.sub("", template))
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the chat template cannot be read ({error})") from None
        self.pieces = functools.lru_cache(maxsize=4096)(self._pieces)
        question = [Slot("user")]
        self._asked = self._literals(question, ask=True)[-1]
        answered = self._literals([*question, Slot("assistant")], ask=False)
        self.end_of_turn = self._first_special(answered[-1])
        lacking = _LOOKS_SPECIAL.findall(self._pattern.sub("", "".join(answered)))
        if lacking:
            raise DataError(
                f"{where}: the tokenizer lacks {', '.join(dict.fromkeys(lacking))}, which its chat template writes; "
                "give another template with chat_template, or add them to the tokenizer"
            )

    def _first_special(self, literal: str) -> int:
        found = self._pattern.search(literal)
        if found is None:
            raise DataError(
                f"{self._where}: the chat template ends an answer with {literal!r}, which has no special token in it: "
                "a model could not end one; give another with chat_template"
            )
        return self._special[found.group()]

    def _literals(self, slots: Sequence[Slot], *, ask: bool) -> list[str]:
        """The template's text before, between and behind the marks of the turns."""
        messages = [
            {"role": slot.role, "content": f"{slot.before}\ue000{index}\ue001{slot.after}"}
            for index, slot in enumerate(slots)
        ]
        try:
            text = self._compiled.render(
                messages=messages, add_generation_prompt=ask, **self.names, **_CONSTANTS
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses this dialogue: {error}") from None
        literals = _MARK.split(text)
        if literals[1::2] != [str(index) for index in range(len(slots))]:
            raise DataError("the chat template leaves out a turn of this dialogue, or changes their order")
        return literals[::2]

    def _pieces(self, slots: tuple[Slot, ...], ask: bool) -> tuple[Piece, ...]:
        """The prompt of a dialogue with these turns; with `ask` it ends where the next answer begins."""
        literals = self._literals(slots, ask=ask)
        found: list[Piece] = []
        for index, slot in enumerate(slots):
            literal, learns = literals[index], slot.role == "assistant"
            if index and slots[index - 1].role == "assistant":
                literal = self._end(literal, found)
            if learns:
                start = self._answer_start(literal, slot)
                found += [*self._split(literal[:start]), Piece(kind="learn"), *self._split(literal[start:])]
            else:
                found += self._split(literal)
            found.append(Piece(kind="turn", turn=index))
        rest = literals[-1]
        if slots and slots[-1].role == "assistant":
            rest = self._end(rest, found)
        return (*found, *self._split(rest))

    def _end(self, literal: str, found: list[Piece]) -> str:
        """Write what ends an answer, which is learned; returns what follows it."""
        end = self._pattern.search(literal)
        stop = end.end() if end else 0
        found += [*self._split(literal[:stop]), Piece(kind="stop")]
        return literal[stop:]

    def _answer_start(self, literal: str, slot: Slot) -> int:
        """Where in the text before an answer the generation prompt ends and what the model writes begins."""
        place = literal.rfind(self._asked)
        if place >= 0 and not literal[place + len(self._asked) :].strip():
            return place + len(self._asked)
        return len(literal) - (len(slot.before) if literal.endswith(slot.before) else 0)

    def _split(self, literal: str) -> list[Piece]:
        """A literal as special tokens and the text between them."""
        found, place = [], 0
        for match in self._pattern.finditer(literal):
            found.append(Piece(kind="text", text=literal[place : match.start()]))
            found.append(Piece(kind="special", token=self._special[match.group()]))
            place = match.end()
        found.append(Piece(kind="text", text=literal[place:]))
        return [piece for piece in found if piece.kind == "special" or piece.text]


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
