"""From text and chats to tokens: the only place that knows chat templates, special tokens and ends of turns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from truecourse.data.formats import Content, Demonstration, PromptRow
from truecourse.data.sequences import Message, Prompt
from truecourse.data.sources import nearest
from truecourse.errors import UserError


class Template:
    """A tokenizer with its chat template.

    Plain text is tokenised by the tokenizer's own policy at its start (`<bos>` where it adds one) and never gets an end
    token behind a prompt. Chats are rendered by the chat template, whose text holds all special tokens that it wants.

    tokenizer: a Hugging Face tokenizer.
    chat_template: Jinja text that replaces the tokenizer's own template.
    end_ids: further ids that end a turn, such as the generation config's `eos_token_id`.

    Raises `UserError` for a chat template that cannot be compiled, and for a tokenizer without any end token.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None, end_ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self.chat_template = chat_template or None
        self._bos = _tokens_in_front(tokenizer)
        self._bos_text = tokenizer.decode(list(self._bos), clean_up_tokenization_spaces=False) if self._bos else ""
        eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
        self.turn_end = self._find_turn_end()
        """The template's own end-of-turn token, where it has one."""
        turn_end = [] if self.turn_end is None else [self.turn_end]
        self.end_ids = tuple(sorted({*eos, *turn_end, *map(int, end_ids)}))
        """All ids that end a turn, ascending."""
        if not self.end_ids:
            raise UserError(
                "the tokenizer names no end-of-sequence token, so no completion could end; set its `eos_token`"
            )
        self._plain_end = eos[0] if eos else self.end_ids[0]

    # -- tokens -------------------------------------------------------------------------------------------------------

    def prompt_tokens(self, content: Content, where: str = "prompt", max_length: int = 0) -> tuple[int, ...]:
        """Tokens of a prompt, as a completion follows them. `where` names it in messages.

        Raises `UserError` for messages without a chat template, for a template that refuses them, for a prompt without
        tokens, and for one longer than `max_length` tokens (0 is no limit).
        """
        tokens = (*self._front(content), *self._encode(self._prompt_text(content, where)))
        if not tokens:
            raise UserError(f"{where}: the prompt is empty once it is tokenised")
        if max_length and len(tokens) > max_length:
            raise UserError(_too_long(where, "prompt", len(tokens), max_length))
        return tokens

    def completion_tokens(self, prompt: Content, completion: Content, where: str = "row") -> tuple[int, ...]:
        """Tokens of a demonstrated completion behind `prompt_tokens(prompt)`, its end token included.

        A chat is rendered whole, with its completion; the rendered prompt must be its beginning. The prompt keeps the
        tokens that it has when a completion is sampled: where the whole's tokens begin with the prompt's, the rest are
        the completion; where the tokenizer would merge across the boundary, the completion is tokenised by itself. What
        the template writes behind the end of the turn (often a line break) is left out, because sampling ends there.
        Text, and a template without an end-of-turn token, gets the tokenizer's end-of-sequence token.

        Raises `UserError` where the rendered prompt is not the beginning of the rendered conversation, and where the
        completion has an end token inside.
        """
        before = self._prompt_text(prompt, where)
        if isinstance(prompt, str):
            assert isinstance(completion, str), "formats.demonstrations gives both as text or both as messages"
            whole = before + completion
        else:
            assert isinstance(completion, list)
            whole = self._render([*prompt, *completion], where, generate=False)
            if not whole.startswith(before):
                raise UserError(
                    f"{where}: the chat template renders the prompt to another text ({_tail(before)!r}) than the same "
                    f"turns inside the conversation ({_tail(whole[: len(before)])!r}), so a model that learns from the "
                    'one would be asked with the other; set `chat_template = "file.jinja"` to one whose generation '
                    "prompt opens the assistant's turn as the conversation does"
                )
        front = self._front(prompt)
        prompt_tokens = (*front, *self._encode(before))
        tokens = (*front, *self._encode(whole))
        if tokens[: len(prompt_tokens)] == prompt_tokens:
            tokens = tokens[len(prompt_tokens) :]
        else:
            tokens = self._encode(whole[len(before) :])
        return self._until_end(tokens, where)

    def prompts(self, rows: Sequence[PromptRow], max_length: int = 0) -> list[Prompt]:
        """The prompts of a data set, indexed by their place in it. Raises as `prompt_tokens` does, naming the rows."""
        prompts = [
            Prompt(index, row.content, self.prompt_tokens(row.content, row.where), row.columns)
            for index, row in enumerate(rows)
        ]
        long = [p for p in prompts if max_length and len(p.tokens) > max_length]
        if long:
            first = long[0]
            more = f" (and {len(long) - 1} more rows)" if len(long) > 1 else ""
            raise UserError(_too_long(rows[first.index].where + more, "prompt", len(first.tokens), max_length))
        return prompts

    def demonstration(self, row: Demonstration, max_length: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """`(prompt tokens, completion tokens)`. Raises as those two do, and for more than `max_length` together."""
        prompt = self.prompt_tokens(row.prompt, row.where)
        completion = self.completion_tokens(row.prompt, row.completion, row.where)
        if max_length and len(prompt) + len(completion) > max_length:
            raise UserError(_too_long(row.where, "demonstration", len(prompt) + len(completion), max_length))
        return prompt, completion

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of sampled tokens: no special tokens, no clean-up of spaces."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    # -- inside -------------------------------------------------------------------------------------------------------

    def _prompt_text(self, content: Content, where: str) -> str:
        return content if isinstance(content, str) else self._render(content, where, generate=True)

    def _front(self, content: Content) -> tuple[int, ...]:
        """What the tokenizer puts before plain text, unless the text has it already."""
        if isinstance(content, str) and not (self._bos_text and content.startswith(self._bos_text)):
            return self._bos
        return ()

    def _render(self, messages: list[Message], where: str, generate: bool) -> str:
        import jinja2

        if not (self.chat_template or self.tokenizer.chat_template):
            raise UserError(
                f"{where} is a chat, but the model's tokenizer has no chat template; set `chat_template = "
                '"file.jinja"` in the recipe, or give plain text prompts'
            )
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=self.chat_template, add_generation_prompt=generate, tokenize=False
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{where}: the chat template refuses this chat: {error}") from None
        assert isinstance(text, str)
        return text

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    def _until_end(self, tokens: tuple[int, ...], where: str) -> tuple[int, ...]:
        end = next((i for i, token in enumerate(tokens) if token in self.end_ids), None)
        if end is None:
            return (*tokens, self._plain_end)
        if self.decode(tokens[end + 1 :]).strip():
            token = self.tokenizer.convert_ids_to_tokens(tokens[end])
            raise UserError(f"{where}: the completion goes on behind the end token {token}, where sampling would stop")
        return tokens[: end + 1]

    def _find_turn_end(self) -> int | None:
        """The first special token behind the text of an assistant turn."""
        if not (self.chat_template or self.tokenizer.chat_template):
            return None
        mark = "truecourse-mark"
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
        text = self._render(chat, "a user turn with its answer", generate=False)
        special = {int(i) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special |= set(self.tokenizer.all_special_ids)
        return next((token for token in self._encode(text.rpartition(mark)[2]) if token in special), None)


def load_chat_template(file: str, base: Path) -> str | None:
    """The text of a recipe's `chat_template`, a path that starts from the recipe's folder; None where it names none."""
    if not file:
        return None
    path = base / Path(file).expanduser()
    if not path.is_file():
        others = [p.name for p in path.parent.glob("*.jinja*")] if path.parent.is_dir() else []
        raise UserError(f"chat_template = {file!r} does not exist in {str(path.parent)!r}{nearest(path.name, others)}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat_template = {file!r} cannot be read: {error}") from None


def _tokens_in_front(tokenizer: Any) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before a text; those that it puts behind have no place in a prompt."""
    with_special = list(tokenizer("a")["input_ids"])
    without = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    starts = range(len(with_special) - len(without) + 1)
    start = next((i for i in starts if with_special[i : i + len(without)] == without), 0)
    return tuple(with_special[:start])


def _too_long(where: str, what: str, length: int, limit: int) -> str:
    return f"{where}: the {what} has {length} tokens, and {limit} fit; shorten it, remove the row, or raise the limit"


def _tail(text: str) -> str:
    return text if len(text) <= 60 else "..." + text[-60:]
