"""Row formats: which columns a row has, and the prompts or demonstrations in it.

    prompt                      text, or chat messages; the other columns reach the reward
    prompt + completion         text, or chat messages; a demonstration
    messages                    a chat; a demonstration for each assistant turn
    prompt + chosen + rejected  a comparison (see `pairs`)

These are TRL's column names, so its data sets work unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from truecourse.data.sequences import Message
from truecourse.data.sources import Row, nearest
from truecourse.errors import UserError

Content = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool")

# columns that other projects use for the same thing, for the error's hint only
ALIASES = {
    "prompt": ("question", "instruction", "query", "problem", "input", "text"),
    "completion": ("response", "answer", "output", "solution", "target", "chosen"),
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat"),
}


class PromptRow(NamedTuple):
    """A prompt to sample from."""

    content: Content
    columns: dict[str, Any]
    """The row's other columns, for the reward."""
    where: str


class Demonstration(NamedTuple):
    """A prompt and the answer to imitate: both text, or both chat messages (the completion is one assistant turn)."""

    prompt: Content
    completion: Content
    where: str


def prompts_for_rl(rows: Sequence[Row], *, chat: bool = False, method: str = "grpo") -> list[PromptRow]:
    """The prompts of `rows`, one for each.

    `messages` that end in an assistant turn give what stands before that turn. A `completion` column and the last
    assistant turn stay out of the columns: the reward's own `completion` is what the model said.
    chat: take a prompt that is plain text as one user turn.

    Raises `UserError` for a row without a prompt, or with one that no model can answer.
    """
    return [_prompt_row(row, chat, method) for row in rows]


def demonstrations(rows: Sequence[Row], *, chat: bool = False, method: str = "sft") -> list[Demonstration]:
    """The demonstrations in `rows`; a chat gives one for each assistant turn, with all before it as the prompt.

    chat: take a plain prompt and completion as a user turn and an assistant turn.

    Raises `UserError` for a row without a completion, or with an empty one.
    """
    return [demonstration for row in rows for demonstration in _demonstrations(row, chat, method)]


def prompt_key(row: Row) -> str:
    """What decides the side of a row in a split: its `split_key`, else the text of its prompt.

    Runs of white space count as one space. In a chat the prompt is what stands before the first assistant turn, so
    that all turns of one conversation stay together.
    """
    if "split_key" in row.values:
        return f"split_key {row.values['split_key']!r}"
    return prompt_text(row)


def prompt_text(row: Row) -> str:
    """The row's opening prompt as plain text, white space normalised."""
    opening = row.values.get("prompt")
    if opening is None:
        opening = row.values.get("messages")
    if isinstance(opening, list):
        turns = messages(opening, row.where)
        first = next((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), len(turns))
        # one user turn and the same as plain text are the same prompt
        single = [t["role"] for t in turns[:first]] == ["user"]
        opening = (
            turns[0]["content"] if single else "\n".join(f"{t['role']}: {t.get('content')}" for t in turns[:first])
        )
    if opening is None:
        raise UserError(_wrong_columns(row, "a split", "`prompt` or `messages`", ("prompt", "messages")))
    return " ".join(str(opening).split())


def messages(value: list[Any], where: str) -> list[Message]:
    """`value` as chat messages: each with a known role and with text (or tool calls); empty fields are dropped.

    Parquet and `datasets` give every message the fields of all, as null: those are the ones that are dropped.
    """
    out = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping) or "role" not in turn:
            fix = '"from"/"value" are ShareGPT\'s names; ' if isinstance(turn, Mapping) and "from" in turn else ""
            raise UserError(f'{where}: message {i} is {turn!r}; {fix}a message is {{"role": "user", "content": "..."}}')
        turn = {k: v for k, v in turn.items() if v is not None}
        if turn.get("role") not in ROLES:
            raise UserError(f"{where}: message {i} has the role {turn.get('role')!r}, not one of {', '.join(ROLES)}")
        content = turn.get("content")
        if not (isinstance(content, str) or (content is None and "tool_calls" in turn) or _is_text_parts(content)):
            raise UserError(f"{where}: message {i} ({turn['role']}) needs text as its content, not {content!r}")
        out.append(turn)
    return out


def _is_text_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content)


# -- one row ----------------------------------------------------------------------------------------------------------


def _prompt_row(row: Row, chat: bool, method: str) -> PromptRow:
    _refuse_tools(row)
    if "prompt" in row.values:
        content, used = _content(row, "prompt", chat), ("prompt", "completion")
    elif "messages" in row.values:
        content = _chat(row)
        content, used = content[:-1] if content[-1]["role"] == "assistant" else content, ("messages", "completion")
    else:
        raise UserError(
            _wrong_columns(row, method, "`prompt` (text or chat messages) or `messages`", ("prompt", "messages"))
        )
    _check_prompt(content, row.where)
    columns = {k: v for k, v in row.values.items() if k not in (*used, "split_key")}
    return PromptRow(content, columns, row.where)


def _demonstrations(row: Row, chat: bool, method: str) -> list[Demonstration]:
    _refuse_tools(row)
    if "prompt" in row.values and "completion" in row.values:
        prompt = _content(row, "prompt", chat)
        _check_prompt(prompt, row.where)
        completion = row.values["completion"]
        if isinstance(prompt, str):
            if not isinstance(completion, str):
                raise UserError(f"{row.where}: `prompt` is text, so `completion` must be text, not {_kind(completion)}")
            _check_text(completion, row.where)
            return [Demonstration(prompt, completion, row.where)]
        if isinstance(completion, str):
            completion = [{"role": "assistant", "content": completion}]
        if not isinstance(completion, list):
            raise UserError(f"{row.where}: `completion` is {_kind(completion)}; it must be text or chat messages")
        return _turns(prompt, messages(completion, row.where), row.where)
    if "messages" in row.values:
        return _turns([], _chat(row), row.where)
    needs = "`prompt` and `completion`, or `messages`"
    if "chosen" in row.values and "rejected" in row.values:
        raise UserError(
            f"{row.where} is a comparison (chosen and rejected), and {method} needs {needs}; "
            "to imitate the chosen answers, rename the column `chosen` to `completion`"
        )
    wanted = ("completion",) if "prompt" in row.values else ("prompt", "completion", "messages")
    raise UserError(_wrong_columns(row, method, needs, wanted))


def _turns(prompt: list[Message], rest: list[Message], where: str) -> list[Demonstration]:
    """One demonstration for each assistant turn of `rest`, with everything before it as its prompt."""
    whole = [*prompt, *rest]
    places = [i for i in range(len(prompt), len(whole)) if whole[i]["role"] == "assistant"]
    if not places:
        raise UserError(f"{where}: no assistant turn to learn from")
    if places[0] == 0:
        raise UserError(f"{where}: the chat opens with an assistant turn; put the turn that it answers before it")
    if whole[-1]["role"] != "assistant":
        raise UserError(f"{where}: the chat ends with a {whole[-1]['role']} turn; leave it out, or add its answer")
    for i in places:
        if "tool_calls" not in whole[i]:
            _check_text(whole[i]["content"], where)
    return [Demonstration(whole[:i], [whole[i]], where) for i in places]


def _chat(row: Row) -> list[Message]:
    value = row.values["messages"]
    if not isinstance(value, list) or not value:
        raise UserError(f"{row.where}: `messages` is {_kind(value)}; it must be a list of chat messages")
    return messages(value, row.where)


def _content(row: Row, column: str, chat: bool) -> Content:
    value = row.values[column]
    if isinstance(value, str):
        return [{"role": "user", "content": value}] if chat else value
    if isinstance(value, list) and value:
        return messages(value, row.where)
    raise UserError(f"{row.where}: `{column}` is {_kind(value)}; it must be text or chat messages")


def _check_prompt(content: Content, where: str) -> None:
    if isinstance(content, str):
        if not content:
            raise UserError(f"{where}: the prompt is empty")
    elif not content:
        raise UserError(f"{where}: nothing stands before the assistant's turn, so there is no prompt")
    elif content[-1]["role"] == "assistant":
        raise UserError(f"{where}: the prompt ends with an assistant turn; end it with the turn to be answered")


def _check_text(text: Any, where: str) -> None:
    if not text:
        raise UserError(f"{where}: the completion is empty")


def _refuse_tools(row: Row) -> None:
    if row.values.get("tools"):
        raise UserError(
            f"{row.where}: a `tools` column would not reach the chat template here; write the tools into the prompt"
        )


def _kind(value: Any) -> str:
    return "empty" if value is None or value == [] else f"of type {type(value).__name__}"


def _wrong_columns(row: Row, method: str, needs: str, wanted: Sequence[str]) -> str:
    found = list(row.values)
    hints = []
    for column in wanted:
        alias = next((a for a in ALIASES[column] if a in found), None)
        if alias:
            extra = " (and make each message role and content)" if column == "messages" else ""
            hints.append(f"rename `{alias}` to `{column}`{extra}")
        elif close := nearest(column, found):
            hints.append(f"`{column}`{close.replace('; did you mean', ' may be')[:-1]}")
    hint = f"; {', and '.join(hints)}" if hints else ""
    return f"{row.where} has the columns {', '.join(found) or '(none)'}; {method} needs {needs}{hint}"
