"""Finding the answer in a text: numbers, and the final answer of a solution."""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]}])-)?"  # a minus behind an operand is a subtraction
    r"(?:\$(?P<sign2>-)?)?"
    r"(?:(?P<mixed>\d{1,6})[ ](?=\d+/\d))?"
    r"(?P<number>(?:\d{1,3}(?:,\d{3}){1,20}(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})(?!\w))?"
    r"(?:/(?P<denominator>\d+(?:\.\d+)?)(?![\d/]))?"
)
_FRAC = re.compile(r"(-?)(\d{0,6})\\[dt]?frac\{(\d+)\}\{(\d+)\}")
_MOST_DIGITS = 4000  # Python refuses to read longer ones

_MARKER = re.compile(
    r"^[ \t>*_]*(?:\#{4,}|(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t*_]*(?:is|:)[ \t]*:?|(?-i:A:))"
    r"[ \t*_]*(?P<answer>\S.*)$",
    re.MULTILINE | re.IGNORECASE,
)
_GSM8K = re.compile(r"####[ \t]*(?=-?\$?-?[\d.])")
_BRACES = re.compile(r"\\[{}]|(?P<box>\\(?:boxed|fbox)\s*\{)|(?P<open>\{)|(?P<close>\})")


def tidy(text: str) -> str:
    """One spelling for what people and models write in several: minus signs, escaped dollars, LaTeX's thousands."""
    return text.replace("−", "-").replace("\\$", "$").replace("{,}", ",").replace("\\!", "").replace("\\,", "")


def to_number(match: re.Match[str]) -> Fraction | None:
    """The value of one match of the number pattern; None for x/0 and for more digits than Python reads."""
    if len(match[0]) > _MOST_DIGITS:
        return None
    value = Fraction(match["number"].replace(",", ""))
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    if match["denominator"]:
        if not Fraction(match["denominator"]):
            return None
        value /= Fraction(match["denominator"])
    value += int(match["mixed"] or 0)
    return -value if match["sign"] or match["sign2"] else value


def plain_number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else: `1,000`, `$3.50`, `-3/4`, `\\frac{3}{4}`, `18.`"""
    text = tidy(text).strip().strip("$").strip().removesuffix(".")
    fraction = _FRAC.fullmatch(text)
    match = _NUMBER.fullmatch("{}{} {}/{}".format(*fraction.groups()).replace("- ", "-").lstrip() if fraction else text)
    return to_number(match) if match else None


def last_number(text: str) -> Fraction | None:
    """The number that a text ends on: the one behind the last `####`, else in the last `\\boxed{}`, else the last one.

    Commas and a dollar sign are read over; `3/4`, `1 1/2`, `.5`, `-2` and `1e3` are numbers; a percent sign is not
    looked at. None where there is no number.
    """
    text = tidy(text)
    marks = list(_GSM8K.finditer(text))
    if marks:
        match = _NUMBER.match(text, marks[-1].end())
        return to_number(match) if match else None
    matches = list(_NUMBER.finditer(boxed(text) or "")) or list(_NUMBER.finditer(text))
    return to_number(matches[-1]) if matches else None


def boxed(text: str) -> str | None:
    """What the last closed `\\boxed{...}` holds; None without one."""
    opened: list[tuple[bool, int]] = []
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match["box"] or match["open"]:
            opened.append((match["box"] is not None, match.end()))
        elif match["close"] and opened:
            is_box, start = opened.pop()
            if is_box and (last is None or start > last[0]):
                last = (start, match.start())
    return text[slice(*last)].strip() if last else None


def final_answer(text: str) -> str | None:
    """The answer that a solution marks as its last word; None where it marks none.

    In this order: the last `\\boxed{...}`; the last line that begins with `####` (GSM8K), `A:`, `Answer:`, `The answer
    is` or `Final answer:`. A marked line that goes on in words is taken only at the end of the text: elsewhere `####`
    is a heading.
    """
    inside = boxed(text)
    if inside is not None:
        return inside
    text = text.rstrip()
    for match in reversed(list(_MARKER.finditer(text))):
        if match.end() == len(text) or not re.match(r"[A-Za-z]{3,}", match["answer"]):
            return match["answer"].rstrip(" \t*_")
    return None


def same_text(a: str, b: str) -> bool:
    """Whether two answers are the same up to case, spaces and LaTeX's dress."""
    return _undress(a) == _undress(b)


_DRESS = re.compile(r"\\(?:left|right|displaystyle|;|,|!| )|\\(?:text|mathrm|textbf|mathbf)\s*(?=\{)|[\s$]")


def _undress(text: str) -> str:
    text = re.sub(r"\\[dt]frac", r"\\frac", tidy(text))
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return _DRESS.sub("", text).removesuffix(".").lower()


_COMMANDS = re.compile(
    r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+|\b(?:sqrt|sin|cos|tan|sec|csc|cot|log|ln|exp|pi|frac|abs|max|min|oo|infty)\b"
)


def to_latex(answer: str) -> str:
    """An answer as math-verify wants it: a bare expression goes in a box, words with a number in them stay words."""
    answer = tidy(answer).strip().removesuffix(".")
    if "$" in answer.strip("$") or re.search(r"\\[(\[]|\\boxed", answer):
        return answer
    answer = answer.strip("$").strip()
    words = re.search(r"[A-Za-z]{3,}", _COMMANDS.sub("", answer))
    return answer if words else rf"\boxed{{{answer}}}"
