"""How much a suite asks, as it is read, and which tasks have right and wrong answers to count."""

from __future__ import annotations

from lm_eval.api.instance import Instance

from fusion.conversations import asking
from harness import questions
from harness.evaluate import Item
from tasks.suite import known_suites, load_suite


def test_a_conversation_is_counted_as_it_is_read() -> None:
    """Neither as the JSON that holds it, nor with the plain text for models without a template."""
    shot = [("user", 'Say "é".'), ("assistant", "é" * 40)]
    items = []
    for number in range(3):
        prompt = asking([*shot, ("user", f"{number}?")], "plain " * 500)
        items.append(Item("task", number, {}, [Instance("generate_until", {}, (prompt, {}), 0)]))
    said = "".join(text + "\n\n" for _, text in shot)
    assert questions._read(items, 3, len) == len(said) + 3 * len("0?")


def test_what_a_judge_gives_is_not_right_or_wrong() -> None:
    judged = [suite for suite in map(load_suite, known_suites()) if suite.judged]
    assert {task.metric for suite in judged for task in suite.tasks} <= questions.UNLIKE
