"""Conversations as text: what a chat template writes around what an assistant says.

A template is run once with marks in place of the answers; what stands between the marks is its
frame, and where the answers lie in the text is known from bytes, whatever else the template or the
conversation holds. Tokens are never counted.

Positions of a reader are in bytes of what all readers share, the answers alone, each followed by
SEPARATOR: a token has read so many bytes of them. The end of a turn is one byte of the separator,
so that ends of turns pair with each other, and the last token of a prompt has read all before its
answer. Every other token has no place there, −1.

Shapes: T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.errors import RunError
from fusion.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = tuple[str, str]  # role and content
SEPARATOR = "\n\n"
CHAT = "\ue002"  # in front of a prompt that is a conversation, as JSON
_MARK = "\ue000{}\ue001"  # of the private use area: no template looks at it


def messages_of(row: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """The conversation in a row of a data set; None if it holds none.

    `messages` (role, content), `conversations` (from, value), or `instruction` with `input` and
    `output`, alone or as `instances`. Contents, or parts of text, are stripped, as many templates
    do.
    """
    turns = row.get("messages", row.get("conversations"))
    if isinstance(turns, list):
        found: list[Message] = []
        for turn in turns:
            one = _turn(turn)
            if one is None:
                return None
            if found and one[0] == found[-1][0] == "assistant":  # a turn in two parts
                one = (one[0], f"{found.pop()[1]}\n\n{one[1]}")
            found.append(one)
        return tuple(found)
    if not isinstance(row.get("instruction"), str):
        return None
    instances = row.get("instances")
    said = instances[0] if isinstance(instances, list) and instances else row
    if not isinstance(said, dict) or not isinstance(said.get("output"), str):
        return None
    asked = [row["instruction"], str(said.get("input") or "")]
    question = "\n\n".join(part.strip() for part in asked if part.strip())
    return ("user", question), ("assistant", said["output"].strip())


def _turn(turn: Any) -> Message | None:
    if not isinstance(turn, dict):
        return None
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(content, list):  # parts, as APIs have them; only text is read here
        texts = [p.get("text") if isinstance(p, dict) else p for p in content]
        said = [text for text in texts if isinstance(text, str)]
        content = "".join(said) if said and len(said) == len(texts) else None
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    role = {"human": "user", "gpt": "assistant"}.get(role, role)
    return role, content.strip()


def answers(messages: Sequence[Message]) -> list[str]:
    """What the assistant says, turn by turn."""
    return [content for role, content in messages if role == "assistant"]


def shared_text(messages: Sequence[Message]) -> str:
    """What all readers of a conversation share: its answers, each with SEPARATOR behind it."""
    return "".join(answer + SEPARATOR for answer in answers(messages))


def frame(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[str] | None:
    """What the tokenizer's chat template writes before, between and behind the answers.

    A system message that the template refuses goes in front of the first question. None if it
    refuses the conversation, or writes an answer not once. RunError if there is no template.
    """
    count = len(answers(messages))
    marks = [_MARK.format(number) for number in range(count)]
    left = iter(marks)
    marked = [(role, next(left) if role == "assistant" else text) for role, text in messages]
    text = _written(tokenizer, marked)
    if text is None or any(text.count(mark) != 1 for mark in marks):
        return None
    parts = []
    for mark in marks:
        before, _, text = text.partition(mark)
        parts.append(before)
    return [*parts, text]


def asking(messages: Sequence[Message], plain: str | None = None) -> str:
    """A conversation that waits for its answer as one prompt, which `asked` reads.

    plain: what a tokenizer without a chat template reads in its place.
    """
    turns = [list(message) for message in messages]
    content = turns if plain is None else {"messages": turns, "plain": plain}
    return CHAT + json.dumps(content, ensure_ascii=False)


def said_in(prompt: str) -> tuple[list[Message], str | None]:
    """The conversation of such a prompt, and what is read in its place without a template."""
    content = json.loads(prompt.removeprefix(CHAT))
    turns = content if isinstance(content, list) else content["messages"]
    plain = None if isinstance(content, list) else content["plain"]
    return [(role, said) for role, said in turns], plain


def words(prompt: str) -> str:
    """What is said in such a prompt, without who says it."""
    return "\n\n".join(said for _, said in said_in(prompt)[0])


def asked(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[str, bool]:
    """Such a prompt as the tokenizer reads it, and whether its chat template wrote that.

    It ends where the answer begins. RunError if there is no template and no plain text for those
    that have none, or the template refuses the conversation.
    """
    messages, plain = said_in(prompt)
    if plain is not None and not tokenizer.chat_template:
        return plain, False
    text = _written(tokenizer, messages, waits=True)
    if text is None:
        raise RunError(
            f"{tokenizer.name_or_path}: its chat template refuses a conversation of "
            f"{', '.join(role for role, _ in messages)}"
        )
    return text, True


def _written(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], waits: bool = False
) -> str | None:
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        raise RunError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, so it cannot read "
            "conversations; take the chat model of its family, or `template: pivot` for a source"
        )
    for attempt in (messages, _without_system(messages)):
        try:
            given = [{"role": role, "content": content} for role, content in attempt]
            return str(
                tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=waits)
            )
        except TemplateError:
            continue
    return None


def _without_system(messages: Sequence[Message]) -> list[Message]:
    system = "\n\n".join(content for role, content in messages if role == "system")
    out = [message for message in messages if message[0] != "system"]
    if system and out:
        out[0] = (out[0][0], f"{system}\n\n{out[0][1]}")
    return out


def borrowed(
    tokenizer: PreTrainedTokenizerBase, parts: Sequence[str], end: str
) -> tuple[list[str], list[int]]:
    """The frame of another tokenizer's template for this one, and the ids that stand in front.

    end: what closes a turn there; a tokenizer that has no such token closes it with its EOS.

    FuseChat (2408.07990): all sources read the pivot's template, with their own end token in it.
    """
    from fusion.models import begins_with_bos

    known = end and end in tokenizer.get_vocab()
    own = end if known or tokenizer.eos_token is None else str(tokenizer.eos_token)
    bos = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    return [part.replace(end, own) if end else part for part in parts], bos


def end_of_turn(tokenizer: PreTrainedTokenizerBase, parts: Sequence[str]) -> str:
    """The control token that closes the first turn of a frame; empty if none does."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
    behind = parts[1].lstrip()
    return max((token for token in tokens if behind.startswith(token)), key=len, default="")


def closing_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The control token with which the chat template closes an answer; None if none does."""
    parts = frame(tokenizer, [("user", "?"), ("assistant", "!")])
    token = end_of_turn(tokenizer, parts) if parts else ""
    return tokenizer.get_vocab()[token] if token else None


def read(
    tokenizer: PreTrainedTokenizerBase,
    parts: Sequence[str],
    said: Sequence[str],
    whole: bool = True,
    front: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a framed conversation and their byte ends over the shared text, (T,) each.

    said: the answers. whole: the last one is not cut short, so that its turn is closed, by EOS if
    the frame does not. front: ids before the text. What comes behind the last answer is left out.
    """
    text, spans = parts[0], []
    for part, answer in zip(parts[1:], said, strict=True):
        start = len(text.encode())
        spans.append((start, start + len(answer.encode())))
        text += answer + part
    unclosed = whole and not parts[-1].strip() and tokenizer.eos_token_id is not None
    if unclosed or not whole:
        text = text[: len(text) - len(parts[-1])]
    tokens = tokenize(tokenizer, text)
    ids, raw = [*front, *tokens.ids.tolist()], [*([0] * len(front)), *tokens.ends.tolist()]
    if unclosed:
        ids, raw = [*ids, tokenizer.eos_token_id], [*raw, len(text.encode()) + 1]
    reached = np.array(raw, dtype=np.int64)
    ends = np.full(len(ids), -1, dtype=np.int64)
    base = 0
    for start, stop in spans:
        inside = (reached > start) & (reached <= stop)
        ends[inside] = base + reached[inside] - start
        closing = int(np.searchsorted(reached, stop, side="right"))
        if closing < len(ids):
            ends[closing] = base + stop - start + 1
        opening = int(np.searchsorted(reached, start, side="right")) - 1
        if opening >= 0 and reached[opening] == start:
            ends[opening] = base
        base += stop - start + len(SEPARATOR)
    stop = int(np.flatnonzero(ends >= 0).max(initial=-1)) + 1
    return np.array(ids[:stop], dtype=np.int64), ends[:stop]


def learned(ends: np.ndarray) -> np.ndarray:
    """Which tokens (T,) of a conversation are said in answer, ends of turns included."""
    inside = ends >= 0
    return inside & np.concatenate([[False], inside[:-1]])


def cut(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], room: int
) -> tuple[list[Message], bool] | None:
    """As much of a conversation's beginning as fits, and whether its last answer is whole.

    None if no answer begins within the room, or the template refuses the conversation.
    """
    kept: list[Message] = list(messages)
    whole = True
    while True:
        said = answers(kept)
        parts = frame(tokenizer, kept) if any(said) else None
        if parts is None:
            return None
        ids, ends = read(tokenizer, parts, said, whole)
        if len(ids) <= room:
            return kept, whole
        last = max(i for i, (role, _) in enumerate(kept) if role == "assistant")
        begins = len((shared_text(kept[:last])).encode())
        inside = ends[:room]
        inside = inside[inside > begins]
        raw = kept[last][1].encode()
        fits = int(min(inside.max() - begins, len(raw))) if len(inside) else 0
        if fits == len(raw):
            fits -= 1  # its end did not fit
        text = raw[: max(0, fits)].decode(errors="ignore")
        if text.strip():
            kept, whole = [*kept[:last], (kept[last][0], text)], False
        else:
            kept, whole = list(kept[:last]), True
            while kept and kept[-1][0] != "assistant":
                kept.pop()
