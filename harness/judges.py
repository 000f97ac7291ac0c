"""Judges: how one is asked, behind an endpoint or as a row of the recipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fusion.errors import RunError
from harness.machine import device
from harness.recipe import Judge

if TYPE_CHECKING:
    from harness.steps import Plan

RETRIES = 5
Ask = Callable[[str, int], tuple[str, int]]  # prompt and number to text and tokens


def endpoint(section: Judge) -> Ask:
    """A judge behind an OpenAI-compatible API; it tries again, with longer and longer pauses.

    RunError if the client is not installed, the key is not set, or the endpoint gives no answer;
    the key is in no message.
    """
    try:
        import openai
    except ImportError as error:
        raise RunError(
            "evaluate.judge.endpoint needs the OpenAI client: pip install openai"
        ) from error
    key = os.environ.get(section.key_env) if section.key_env else "none"
    if key is None:
        raise RunError(f"evaluate.judge.key_env: {section.key_env} is not set in the environment")
    client = openai.OpenAI(base_url=section.endpoint, api_key=key, max_retries=RETRIES, timeout=600)

    def ask(prompt: str, number: int) -> tuple[str, int]:
        try:
            done = client.chat.completions.create(
                model=section.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=section.temperature,
                max_tokens=section.max_tokens,
            )
            text = done.choices[0].message.content or ""
        except openai.OpenAIError as error:
            what = str(error).replace(key, "KEY" if section.key_env else key)[:300]
            raise RunError(
                f"judge {section.model} at {section.endpoint}: {type(error).__name__}: {what}; "
                "verdicts so far are kept, run again to go on"
            ) from error
        except (IndexError, AttributeError, TypeError, ValueError) as error:
            raise RunError(
                f"judge {section.model} at {section.endpoint}: its answer has no message in it"
            ) from error
        return text, int(done.usage.total_tokens) if done.usage else 0

    return ask


def local(plan: Plan, row: str) -> Ask:
    """A judge that is a row of the recipe, opened when it is first asked; it writes greedily, or by
    its temperature, and a verdict that is asked for again is the next sample.

    RunError if its weights are not there, or its tokenizer has no chat template.
    """
    models: list[Any] = []
    section = plan.recipe.evaluate.judge
    assert section

    def ask(prompt: str, number: int) -> tuple[str, int]:
        from fusion.conversations import asking
        from harness.model_folder import model_folder
        from harness.scoring import Instance, SharedPrefixLM

        if not models:
            folder = model_folder(plan, row)
            if not (folder / "config.json").is_file():
                raise RunError(f"evaluate.judge: {row} is not built; `kfuse build --only {row}`")
            dtype, place = plan.recipe.evaluate.dtype, device(plan)
            models.append(SharedPrefixLM(str(folder), dtype, place, seed=plan.recipe.seed))
        arguments: dict[str, Any] = {"max_gen_toks": section.max_tokens}
        if section.temperature or number:
            arguments |= {"do_sample": True, "temperature": section.temperature or 1.0}
        request = Instance("generate_until", {}, (asking([("user", prompt)]), arguments), 0)
        said = models[0].generate([request] * (number + 1))[-1]
        return said.text, said.tokens

    return ask


def reached(plan: Plan, section: Judge) -> Ask:
    """How the recipe's judge is asked."""
    return endpoint(section) if section.endpoint else local(plan, section.model)
