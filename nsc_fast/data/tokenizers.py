"""Tokenizers that adapters bring along: the merged adapter can serve only one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MergeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_tokenizers"]

_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "added_tokens.json", "chat_template*")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def check_tokenizers(
    folders: Mapping[str, Path], base: PreTrainedTokenizerBase | None = None
) -> tuple[list[str], dict[str, str]]:
    """Compares the tokenizers in the adapters' folders with each other and with the base model's.

    Adapters that come from the hub are fetched without their tokenizers and are not compared. A padding
    token that is not in the other vocabulary does not count: padding is never looked at.

    Args:
        folders: adapter -> its folder; those without tokenizer files are passed over.
        base: the base model's tokenizer.

    Returns:
        Notices (more tokens, another chat template, an unreadable tokenizer), and the adapters' chat
        templates.

    Raises:
        MergeError: the same token has two ids, or the same id two tokens; names the adapters.
    """
    found: dict[str, Any] = {}
    by_content: dict[str, Any] = {}
    notices = []
    for name, folder in folders.items():
        if not any((folder / file).is_file() for file in _VOCABULARIES):
            continue
        content = _digest(folder)
        if content not in by_content:
            by_content[content] = _load(folder)
        loaded = by_content[content]
        if isinstance(loaded, Exception):
            notices.append(f"adapter {name!r}: its tokenizer cannot be read and is not compared: {loaded}")
        else:
            found[name] = loaded
    known = {f"adapter {name!r}": tokenizer for name, tokenizer in found.items()}
    if base is not None:
        known = {"the base model": base, **known}
    vocabularies = {id(t): t.get_vocab() for t in known.values()}
    for (one, first), (two, second) in combinations(known.items(), 2):
        if first is not second:
            _compare(one, first, vocabularies[id(first)], two, second, vocabularies[id(second)])
    if base is not None:
        for name, tokenizer in found.items():
            notices += _additions(name, vocabularies[id(tokenizer)], vocabularies[id(base)])
    templates = {name: t.chat_template for name, t in found.items() if getattr(t, "chat_template", None)}
    templates = {name: template for name, template in templates.items() if isinstance(template, str)}
    return notices + _other_templates(templates, base), templates


def _load(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        return error


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _FILES for file in folder.glob(pattern) if file.is_file()}):
        content = file.read_bytes()
        digest.update(f"{file.name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _compare(
    one: str, first: Any, left: Mapping[str, int], two: str, second: Any, right: Mapping[str, int]
) -> None:
    if left == right:
        return
    unread = {token for token in (first.pad_token, second.pad_token) if (token in left) != (token in right)}
    # In the order of the ids: a tokenizer's own order changes from run to run.
    left = {token: left[token] for token in sorted(left, key=left.get) if token not in unread}
    right = {token: number for token, number in right.items() if token not in unread}
    for token, number in left.items():
        if token in right and right[token] != number:
            raise _mismatch(
                f"{token!r} is token {number} in the tokenizer of {one} and {right[token]} in", two
            )
    tokens = {number: token for token, number in right.items()}
    for token, number in left.items():
        if number in tokens and tokens[number] != token:
            raise _mismatch(
                f"token {number} is {token!r} in the tokenizer of {one} and {tokens[number]!r} in", two
            )


def _mismatch(what: str, other: str) -> MergeError:
    return MergeError(
        f"{what} that of {other}: adapters that were trained with different tokenizers cannot be merged. If "
        "they were trained with the same one, remove the tokenizer files from the adapter's folder"
    )


def _additions(name: str, own: Mapping[str, int], base: Mapping[str, int]) -> list[str]:
    added = sorted((token for token in own if token not in base), key=own.get)
    if not added:
        return []
    some = ", ".join(map(repr, added[:3])) + (", ..." if len(added) > 3 else "")
    return [
        f"adapter {name!r}: its tokenizer has {len(added)} tokens that the base model's does not have "
        f"({some}); the base model's is used"
    ]


def _other_templates(templates: Mapping[str, str], base: Any) -> list[str]:
    notices = []
    usual = getattr(base, "chat_template", None)
    if usual:
        other = [name for name, template in templates.items() if template != usual]
        if other:
            notices.append(f"{_names(other)}: another chat template than the base model's")
    elif len(set(templates.values())) > 1:
        notices.append(f"{_names(templates)}: different chat templates")
    return notices


def _names(names: Any) -> str:
    return "adapters " + ", ".join(map(repr, names))
