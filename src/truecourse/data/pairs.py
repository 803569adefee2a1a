"""Comparisons: from rows with `chosen` and `rejected` to two answers behind one prompt, in tokens.

    prompt + chosen + rejected   the prompt as text or chat messages; the answers as text or as one assistant turn each
    chosen + rejected            whole conversations that share all but their last turn, or whole texts

Malformed pairs are found here, before rows are split, and named by their place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from truecourse.data.formats import Content, messages
from truecourse.data.sequences import Message
from truecourse.data.sources import Row
from truecourse.data.template import Template
from truecourse.errors import UserError


class Pair(NamedTuple):
    """A prompt and two answers to it: all text, or all chat messages (an answer is one assistant turn)."""

    prompt: Content
    chosen: Content
    rejected: Content
    where: str


class TokenPair(NamedTuple):
    """The same in tokens; an answer ends in its end token."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


class Problem(NamedTuple):
    """Why a row is no pair to learn from."""

    where: str
    reason: str


class _Malformed(Exception):
    pass


def comparisons(rows: Sequence[Row], prompt_end: str = "") -> tuple[list[Row], list[Problem]]:
    """The rows that can be learned from, each with a `prompt` of its own, and what is wrong with the others.

    Whole conversations share their prompt, all turns but the last. Whole texts share what ends in the last
    `prompt_end`, such as "\\n\\nAssistant:"; without one, their longest common beginning up to its last white space, so
    words that both answers open with count as prompt. Rows with neither side pass: they may be prompts for the gold.

    Raises `UserError` for messages that are none.
    """
    good, problems = [], []
    for row in rows:
        try:
            good.append(_explicit(row, prompt_end) if "chosen" in row.values or "rejected" in row.values else row)
        except _Malformed as error:
            problems.append(Problem(row.where, str(error)))
    return good, problems


def compared(row: Row) -> bool:
    """Whether the row is a comparison, and not a bare prompt."""
    return "chosen" in row.values


def pairs(rows: Sequence[Row], *, chat: bool = False, method: str = "dpo") -> list[Pair]:
    """The pairs in rows that `comparisons` gave. Raises `UserError` for a row that is no comparison.

    chat: take a plain prompt and its answers as a user turn and assistant turns.
    """
    found = []
    for row in rows:
        if not compared(row):
            has = ", ".join(row.values) or "(none)"
            raise UserError(f"{row.where} has the columns {has}; {method} needs `chosen` and `rejected`")
        prompt, chosen, rejected = (row.values[name] for name in ("prompt", "chosen", "rejected"))
        if chat and isinstance(prompt, str):
            prompt, chosen, rejected = _turn("user", prompt), _turn("assistant", chosen), _turn("assistant", rejected)
        found.append(Pair(prompt, chosen, rejected, row.where))
    return found


def tokenise(
    found: Sequence[Pair], template: Template, max_length: int = 0
) -> tuple[list[TokenPair], list[Problem], list[Problem]]:
    """The pairs in tokens; those whose answers are the same in tokens; those that are longer than `max_length`
    tokens with their longer answer (0 is no limit). Raises as `Template.prompt_tokens` and `completion_tokens` do."""
    good: list[TokenPair] = []
    same: list[Problem] = []
    long: list[Problem] = []
    for prompt, chosen, rejected, where in found:
        front = template.prompt_tokens(prompt, where)
        pair = TokenPair(front, *(template.completion_tokens(prompt, side, where) for side in (chosen, rejected)))
        if pair.chosen == pair.rejected:
            same.append(Problem(where, "chosen and rejected are the same tokens"))
        elif 0 < max_length < len(front) + max(len(pair.chosen), len(pair.rejected)):
            long.append(Problem(where, f"longer than {max_length} tokens"))
        else:
            good.append(pair)
    return good, same, long


def settle(problems: Sequence[Problem], choice: Literal["refuse", "skip"], key: str, of: int) -> str:
    """What is told of pairs that are skipped, with all their places; empty where there are none.

    Raises `UserError` where they are to be refused. `key` is the recipe's key that chooses, `of` how many rows there
    were.
    """
    if not problems:
        return ""
    by_reason: dict[str, list[str]] = {}
    for where, reason in problems:
        by_reason.setdefault(reason, []).append(where)
    listed = "; ".join(f"{reason}: {_places(places)}" for reason, places in by_reason.items())
    if choice == "skip":
        return f"{len(problems)} of {of} pairs are skipped ({key}): {listed}"
    raise UserError(f'{len(problems)} of {of} pairs cannot be learned from: {listed}. Mend them, or set {key} = "skip"')


# -- one row ----------------------------------------------------------------------------------------------------------


def _explicit(row: Row, prompt_end: str) -> Row:
    chosen, rejected = (_side(row, name) for name in ("chosen", "rejected"))
    prompt = row.values.get("prompt")
    if isinstance(prompt, list):
        prompt = messages(prompt, row.where)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _Malformed("one of chosen and rejected is text and the other a chat")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if prompt is None:
            prompt, chosen, rejected = _cut_texts(chosen, rejected, prompt_end)
        if not (chosen.strip() and rejected.strip()):
            raise _Malformed(f"{'rejected' if chosen.strip() else 'chosen'} is empty")
        if isinstance(prompt, list):
            chosen, rejected = _turn("assistant", chosen), _turn("assistant", rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        whole = [side[0]["role"] != "assistant" for side in (chosen, rejected)]
        if any(whole) and not isinstance(prompt, list):  # a prompt that is text stands in the conversations as well
            if chosen[:-1] != rejected[:-1]:
                raise _Malformed("the prompt is not shared")
            prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:]
        elif isinstance(prompt, str) and prompt:
            prompt = _turn("user", prompt)
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            if len(side) != 1 or side[0]["role"] != "assistant":
                raise _Malformed(f"{name} is not one assistant turn behind the prompt")
            if not _has_text(side[0]):
                raise _Malformed(f"{name} is empty")
    if not prompt:
        raise _Malformed("the prompt is missing")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise _Malformed("the prompt ends with an assistant turn")
    if not isinstance(prompt, str | list):
        raise _Malformed("the prompt is neither text nor a chat")
    if chosen == rejected:
        raise _Malformed("chosen and rejected are identical")
    return Row({**row.values, "prompt": prompt, "chosen": chosen, "rejected": rejected}, row.where)


def _side(row: Row, name: str) -> Any:
    value = row.values.get(name)
    if value is None or value == []:
        raise _Malformed(f"{name} is missing")
    if isinstance(value, list):
        return messages(value, row.where)
    if not isinstance(value, str):
        raise _Malformed(f"{name} is neither text nor a chat")
    if not value.strip():
        raise _Malformed(f"{name} is empty")
    return value


def _cut_texts(chosen: str, rejected: str, prompt_end: str) -> tuple[str, str, str]:
    """The prompt that two whole texts share, and what follows it in each."""
    if prompt_end:
        places = [text.rfind(prompt_end) for text in (chosen, rejected)]
        if min(places) < 0:
            raise _Malformed("prompt_end does not occur in both texts")
        heads = [text[: at + len(prompt_end)] for text, at in zip((chosen, rejected), places, strict=True)]
        if heads[0] != heads[1]:
            raise _Malformed("the prompt is not shared")
        at = len(heads[0])
    else:
        if chosen == rejected:
            raise _Malformed("chosen and rejected are identical")
        differ = (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        common = chosen[: next(differ, min(len(chosen), len(rejected)))]
        at = max((space.start() for space in re.finditer(r"\s", common)), default=0)
        if not chosen[:at].strip():
            raise _Malformed("the prompt is not shared")
    return chosen[:at], chosen[at:], rejected[at:]


def _turn(role: str, text: Any) -> list[Message]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _has_text(turn: Message) -> bool:
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text", "") for part in content)
    return bool("tool_calls" in turn or (content and content.strip()))


def _places(wheres: Sequence[str]) -> str:
    """`data.jsonl:3, 17, 20` for places in one file."""
    shown, last = [], None
    for where in wheres:
        match = re.fullmatch(r"(.*[: ])(\d+)", where)
        head, number = match.groups() if match else (where, "")
        shown.append(number if match and head == last else where)
        last = head
    return ", ".join(shown)
