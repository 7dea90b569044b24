"""Which columns of a row are inputs, and what they make together."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..batches import LABELS
from ..errors import MergeError
from ..recipe import DataOptions, template_columns
from .messages import read_chat
from .sources import Source

__all__ = ["Example", "Plan", "plan"]

_TEXT = (
    *("sentence", "content", "prompt", "question", "instruction", "article", "document", "dialogue"),
    *("review", "query", "input", "tokens", "words"),
)
_PAIRS = (
    *(("text", "text_pair"), ("premise", "hypothesis"), ("sentence1", "sentence2")),
    *(("question1", "question2"), ("question", "context"), ("question", "sentence")),
    *(("query", "passage"), ("text_a", "text_b")),
)
_CHATS = ("messages", "conversations")
_IMAGES = ("image", "image_path", "img", "file_name", "pixel_values")
_LABELS = {*LABELS, "target", "targets", "answer", "answers", "output", "completion", "response", "summary"}


@dataclass(frozen=True)
class Example:
    """The inputs of one row.

    Attributes:
        place: where it stands, for messages.
        text: text, or its words where the row holds a list of them.
        pair: second text.
        messages: of a chat; see :func:`nsc_fast.data.messages.read_chat`.
        images: paths, bytes or PIL images; a chat may have several.
    """

    place: str
    text: str | tuple[str, ...] | None = None
    pair: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    images: tuple[Any, ...] = ()

    @property
    def size(self) -> int:
        """Characters of the text, to put rows of similar length together."""
        return len(self.text or "") + len(self.pair or "")


@dataclass(frozen=True)
class Plan:
    """How rows of one source become examples.

    Attributes:
        columns: all that are read.
        text: columns of the text, none for chats and bare images.
        messages: column of the chat.
        image: column of the image; beside a chat, of the image or images, and a row may do without.
    """

    source: Source
    options: DataOptions
    text: tuple[str, ...] = ()
    messages: str | None = None
    image: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.text, *filter(None, (self.messages, self.image)))))

    def missing(self, present: Container[str]) -> list[str]:
        """Columns that a row, or a table, must have and does not have."""
        # Rows of a chat without images need not name the column.
        free = self.image if self.messages is not None and self.source.columns() is None else None
        return [column for column in self.columns if column not in present and column != free]

    def example(self, number: Any, raw: Any) -> Example | None:
        """The example of a record; None where it holds nothing.

        Raises:
            MergeError: a missing column, or a value that is no text, chat or image.
        """
        row = self.source.parse(number, raw)
        missing = self.missing(row)
        if missing:
            raise self.source.error(
                number,
                f"no column {' and '.join(missing)} (it has {', '.join(row)}); name the columns with "
                "data.text, data.template, data.messages or data.image",
            )
        place = self.source.place(number)
        if self.messages is not None:
            messages, images = self._chat(number, row)
            return Example(place, messages=messages, images=images) if messages else None
        image = None if self.image is None else row[self.image]
        if self.image is not None and (image is None or image == ""):
            return None
        if not self.text:
            return Example(place, images=(image,))
        images = () if image is None else (image,)
        parts = [self._text(number, column, row[column]) for column in self.text]
        if not any(part.strip() if isinstance(part, str) else part for part in parts):
            return None
        if len(parts) > 1 and not all(isinstance(part, str) for part in parts):
            raise self.source.error(number, "a list of words cannot be combined with other columns")
        if self.options.template is not None:
            values = dict(zip(self.text, parts, strict=True))
            if not all(isinstance(part, str) for part in parts):
                raise self.source.error(number, "a list of words does not go into a template")
            return Example(place, self.options.template.format_map(values), images=images)
        return Example(place, *parts, images=images)

    def _text(self, number: Any, column: str, value: Any) -> str | tuple[str, ...]:
        if value is None:
            return ""
        if isinstance(value, str | int | float):
            return str(value)
        if isinstance(value, Sequence) and all(isinstance(word, str) for word in value):
            return tuple(value)
        raise self.source.error(number, f"column {column!r} holds a {type(value).__name__}, not text")

    def _chat(
        self, number: Any, row: Mapping[str, Any]
    ) -> tuple[tuple[Mapping[str, Any], ...], tuple[Any, ...]]:
        chat, given = row[self.messages], None
        if not isinstance(chat, Sequence) or isinstance(chat, str):
            raise self.source.error(number, f"column {self.messages!r} holds no list of messages")
        if self.image is not None:
            value = row.get(self.image)
            given = value if isinstance(value, list | tuple) else [value]
            given = [image for image in given if image is not None and image != ""]
        try:
            return read_chat(chat, given, keep_answer=self.options.keep_answer)
        except ValueError as error:
            raise self.source.error(number, str(error)) from error


def plan(source: Source, options: DataOptions, columns: Sequence[str]) -> tuple[Plan, list[str]]:
    """What is read of a source with these columns, and what the user should know about it.

    Raises:
        MergeError: no column or several could be meant.
    """
    made, guessed = _choose(source, options, columns)
    missing = made.missing(columns)
    if missing:
        raise MergeError(
            f"task {source.task!r}: {source.name}: no column {' and '.join(missing)} (it has "
            f"{', '.join(columns)}); name the columns with data.text, data.template, data.messages or "
            "data.image"
        )
    notices = []
    if guessed:
        notices.append(f"column {' and '.join(map(repr, made.columns))} taken as the input")
    unread = [column for column in columns if column not in made.columns]
    if unread:
        notices.append(f"not read: {', '.join(map(repr, unread))}; only inputs are")
    labels = [column for column in made.columns if column in _LABELS]
    if labels:
        notices.append(f"column {labels[0]!r}, which was asked for, looks like a label")
    return made, notices


def _choose(source: Source, options: DataOptions, columns: Sequence[str]) -> tuple[Plan, bool]:
    """The plan, and whether a column had to be guessed."""
    text: tuple[str, ...] = ()
    if options.template is not None:
        text = template_columns(options.template)
    elif options.text is not None:
        text = (options.text,) if isinstance(options.text, str) else options.text
    present = set(columns)
    chatting = options.messages is not None or options.format == "chat"
    if options.format == "image" or source.images or (options.image is not None and not chatting):
        image = options.image or _only(source, columns, [c for c in _IMAGES if c in present], "image")
        return Plan(source, options, text, image=image), options.image is None and not source.images
    if text:
        return Plan(source, options, text), False
    chats = [column for column in _CHATS if column in present]
    if chatting:
        messages = options.messages or _only(source, columns, chats, "messages")
        guessed = options.messages is None and messages != "messages"
        return Plan(source, options, messages=messages, image=options.image), guessed
    pairs = [pair for pair in _PAIRS if set(pair) <= present]
    if options.format == "pair":
        return Plan(source, options, _only(source, columns, pairs, "text")), True
    if options.format == "text":
        chats, pairs = [], []
    if pairs and pairs[0] == ("text", "text_pair"):
        return Plan(source, options, pairs[0]), False
    if "text" in present:
        if "image" in present:
            raise MergeError(
                f"task {source.task!r}: {source.name}: there are images and texts; set data.format to "
                "'text', or data.image (and data.text, where it is an input)"
            )
        return Plan(source, options, ("text",)), False
    if chats and "image" in present:
        raise MergeError(
            f"task {source.task!r}: {source.name}: there are chats and images; set data.format to 'chat', "
            "and data.image where the images are inputs"
        )
    if len(pairs) == 1 and not chats:
        return Plan(source, options, pairs[0]), True
    texts = [column for column in _TEXT if column in present]
    if len(columns) == 1 and columns[0] not in (*_CHATS, *_IMAGES):
        texts = list(columns)
    found = [*chats, *(() if pairs else texts), *pairs, *(["image"] if "image" in present else [])]
    only = _only(source, columns, found, "text")
    if only in _CHATS:
        return Plan(source, options, messages=only), only != "messages"
    if only == "image":
        return Plan(source, options, image=only), True
    return Plan(source, options, only if isinstance(only, tuple) else (only,)), True


def _only(source: Source, columns: Sequence[str], found: list[Any], key: str) -> Any:
    if len(found) == 1:
        return found[0]
    what = f"several could be meant ({', '.join(map(str, found))})" if found else "none has a well-known name"
    raise MergeError(
        f"task {source.task!r}: {source.name}: which column is the input? It has {', '.join(columns)}; "
        f"{what}: name it with data.{key}"
    )
