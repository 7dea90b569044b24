"""Messages of a chat in the ways people write them, and which image belongs where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["read_chat"]

Message = Mapping[str, Any]

# The two ways in which chats are written.
_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {"human": "user", "gpt": "assistant"}
# Where an image stands in a text, in data of the LLaVA kind.
_PLACEHOLDER = "<image>"
_ADDRESSES = ("url", "image_url", "base64")


def read_chat(
    value: Sequence[Any], given: Sequence[Any] | None = None, *, keep_answer: bool = False
) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """The messages of a row, and its images in the order in which they stand in the chat.

    Images stand where parts of type "image" do; else where the texts say ``<image>``; else at the beginning
    of the first message of the user. A line break beside ``<image>`` belongs to it: what separates images
    from text is the chat template's business.

    Args:
        value: the messages.
        given: images from a column of their own; None where there is no such column, and ``<image>`` is then
            a text like any other.
        keep_answer: keep an assistant's message at the end.

    Returns:
        Messages as ``{"role": ..., "content": ...}`` and what else they hold; a content is a text, or a list
        of ``{"type": "text", "text": ...}`` and ``{"type": "image"}``. The images: paths, bytes, PIL images.

    Raises:
        ValueError: something else than a message, a part that is neither text nor image, an address instead
            of an image, or not as many images as places for them.
    """
    messages = [_message(message) for message in value]
    if messages and messages[-1]["role"] == "assistant" and not keep_answer:
        messages.pop()
    if not messages:
        return (), ()
    if given is not None and not any(_image_parts(messages)):
        messages = [{**message, "content": _split(message["content"])} for message in messages]
        if given and not any(_image_parts(messages)):
            messages = _images_first(messages, len(given))
    parts = list(_image_parts(messages))
    images = _images(parts, [_local(image) for image in given or ()])
    return tuple({**message, "content": _bare(message["content"])} for message in messages), images


def _message(message: Any) -> dict[str, Any]:
    keys = next((k for k in _KEYS if isinstance(message, Mapping) and set(k) <= set(message)), None)
    content = None if keys is None else message[keys[1]]
    listed = isinstance(content, Sequence) and all(isinstance(part, Mapping) for part in content)
    if keys is None or not (content is None or isinstance(content, str) or listed):
        raise ValueError(
            f"a message needs a role and a content, which is a text or a list of parts, not {message!r:.80}"
        )
    role = message[keys[0]]
    content = content or "" if isinstance(content, str | None) else [_part(part) for part in content]
    return {**message, "role": _ROLES.get(role, role), "content": content}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    # Tables give every part the keys of all parts.
    part = {key: value for key, value in part.items() if value is not None}
    if part.get("type") == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if part.get("type") not in ("image", "image_url"):
        raise ValueError(f"a part of a content is a text or an image, not {part!r:.80}")
    address = next((key for key in _ADDRESSES if key in part), None)
    if address is not None:
        raise ValueError(
            f"an image part has a {address}, and images are not fetched or decoded from text: save the image "
            'and write {"type": "image", "path": ...}'
        )
    image = part.get("image", part.get("path"))
    held = {} if image is None else {"image": _local(image)}
    return {"type": "image", **held, **({"index": part["index"]} if "index" in part else {})}


def _local(image: Any) -> Any:
    if isinstance(image, str) and ("://" in image or image.startswith("data:")):
        raise ValueError(
            f"{image[:60]!r} is an address, and images are not fetched: save the image and give its path"
        )
    return image


def _image_parts(messages: Sequence[Message]) -> Any:
    contents = (message["content"] for message in messages if not isinstance(message["content"], str))
    return (part for content in contents for part in content if part["type"] == "image")


def _split(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A content with an image part for every placeholder in its texts."""
    if isinstance(content, list):
        pieces = (_split(part["text"]) for part in content)
        return [p for own in pieces for p in ([_text(own)] if isinstance(own, str) else own)]
    first, *others = content.split(_PLACEHOLDER)
    if not others:
        return content
    parts = [_text(first.removesuffix("\n"))]
    for number, text in enumerate(others, 1):
        text = text.removeprefix("\n")
        parts += [{"type": "image"}, _text(text if number == len(others) else text.removesuffix("\n"))]
    return [part for part in parts if part.get("text") != ""]


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _images_first(messages: Sequence[Message], count: int) -> list[dict[str, Any]]:
    """The images in front of the first message of the user."""
    first = next((k for k, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError("there is no message of the user that its image could stand in")
    out = [dict(message) for message in messages]
    content = out[first]["content"]
    texts = [_text(content)] if isinstance(content, str) else content
    out[first]["content"] = [*({"type": "image"} for _ in range(count)), *texts]
    return out


def _images(parts: Sequence[Mapping[str, Any]], given: Sequence[Any]) -> tuple[Any, ...]:
    """The images in the order of their parts."""
    held = [part["image"] for part in parts if "image" in part]
    if held and given:
        raise ValueError("the chat holds images itself, and so does the image column: leave data.image out")
    if len(held or given) != len(parts):
        places = "1 place for an image" if len(parts) == 1 else f"{len(parts)} places for images"
        count = {0: "no image", 1: "1 image"}.get(len(held or given), f"{len(held or given)} images")
        raise ValueError(f"the chat has {places}, and the row {count}; name their column with data.image")
    if any(part.get("index", k) != k for k, part in enumerate(parts)):
        raise ValueError(f"the image parts are numbered {[p.get('index') for p in parts]}: put them in order")
    return tuple(held or given)


def _bare(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [part if part["type"] == "text" else {"type": "image"} for part in content]
