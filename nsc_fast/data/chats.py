"""Chats as texts, written by the chat template of a tokenizer or of a processor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import MergeError
from ..recipe import DataOptions
from .columns import Example

__all__ = ["render_chats"]

# Said to a template to see what it makes of it.
_PROBE = "nscfastprobe"


def render_chats(
    task: str, examples: Sequence[Example], writer: Any, options: DataOptions, template: str | None = None
) -> list[Example]:
    """Chats as texts.

    Templates of tokenizers usually want contents that are texts, templates of processors lists of parts, and
    what they do with the other kind ranges from an error to leaving it out. Contents are therefore brought
    into a form that the template is seen to write. A list becomes a text with line breaks between its parts
    and the processor's image token for an image.

    Args:
        writer: tokenizer, or processor of images with texts.
        template: instead of the writer's own.

    Raises:
        MergeError: no chat template, or one that refuses a chat (roles out of order, say) or has no place for
            its images.
    """
    own = getattr(writer, "chat_template", None)
    if template is None and not own and hasattr(writer, "tokenizer"):
        template = getattr(writer.tokenizer, "chat_template", None)
    if not template and not own:
        raise MergeError(
            f"task {task!r}: the {'processor' if hasattr(writer, 'tokenizer') else 'tokenizer'} has no chat "
            "template; write the prompt yourself with data.template, or put the adapter's "
            "chat_template.jinja beside its weights with its tokenizer"
        )

    def write(messages: list[Mapping[str, Any]], asks: bool) -> str:
        return writer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=asks
        )

    token = getattr(writer, "image_token", None)
    forms = _forms(write, None if token is None else str(token))
    # Of other roles, such as tools, contents go in as they stand.
    as_it_stands = _Form(False, False, False, None)
    out = []
    for example in examples:
        asks = example.messages[-1]["role"] != "assistant" and options.generation_prompt
        try:
            messages = [
                {**m, "content": forms.get(m["role"], as_it_stands).of(m["content"])}
                for m in example.messages
            ]
            text = write(messages, asks)
        except _refusals() as error:
            raise MergeError(
                f"task {task!r}: {example.place}: the chat template refuses this chat: {error}"
            ) from error
        out.append(replace(example, text=text, messages=()))
    return out


@dataclass(frozen=True)
class _Form:
    """Contents that a template writes: texts, lists of text parts, lists with image parts."""

    texts: bool
    lists: bool
    images: bool
    image_token: str | None

    def of(self, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        """The content in a form that the template writes; as it stands where none was found.

        Raises:
            ValueError: images that the template cannot place.
        """
        if not (self.texts or self.lists):
            return content
        if isinstance(content, str):
            return content if self.texts else [{"type": "text", "text": content}]
        with_image = any(part["type"] == "image" for part in content)
        if self.images if with_image else self.lists:
            return content
        if with_image and not (self.texts and self.image_token):
            raise ValueError("it has no place for images; the base's processor needs one that has")
        return "\n".join(self.image_token if p["type"] == "image" else p["text"] for p in content)


def _forms(
    write: Callable[[list[Mapping[str, Any]], bool], str], image_token: str | None
) -> dict[str, _Form]:
    """What the template writes of each role: some take lists of the user and a text of the system."""
    said = {"type": "text", "text": _PROBE}

    def written(content: Any, role: str, asked: Any) -> str | None:
        chat = [{"role": role, "content": content}]
        if role != "user":
            chat.insert(0 if role == "assistant" else 1, {"role": "user", "content": asked})
        try:
            out = write(chat, False)
        except _refusals():
            return None
        # A list that is taken for a text is written as Python or JSON writes it.
        return out if _PROBE in out and "'type':" not in out and '"type":' not in out else None

    forms: dict[str, _Form] = {}
    for role in ("user", "system", "assistant"):
        asked = forms["user"].of("?") if forms else None
        text, lists, images = (
            written(content, role, asked) for content in (_PROBE, [said], [{"type": "image"}, said])
        )
        forms[role] = _Form(text is not None, lists is not None, images not in (None, lists), image_token)
    return forms


def _refusals() -> tuple[type[Exception], ...]:
    from jinja2 import TemplateError

    return TemplateError, ValueError, TypeError
