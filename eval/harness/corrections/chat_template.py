"""Chat templates that refuse a system message, or leave it out: its text goes into the first user turn.

lm-eval drops the system message with a warning that it also turns off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from common.errors import EvaluationError, first_line
from common.files.bounded_reading import LimitError
from common.processes.execution_limits import TEMPLATE_MEMORY, TEMPLATE_SECONDS, memory_limit, time_limit
from common.terminal_text import foreign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.files.json_values import JsonObject

MOVED = "The chat template takes no system message: its text is put at the beginning of the first user turn."
Chat = list[dict[str, str]]


def render(
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
    add_generation_prompt: bool,
    arguments: JsonObject,
    report: Callable[[str], None],
) -> str:
    """Return a chat as text.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        chat: Messages with role and content.
        add_generation_prompt: False where the last message is the beginning of the answer.
        arguments: Further variables of the template, such as enable_thinking.
        report: Called with a sentence where the system message was moved.

    Raises:
        EvaluationError: The template refuses the chat for another reason.
    """
    import jinja2

    def rendered(messages: Chat) -> str:
        with (
            time_limit(TEMPLATE_SECONDS, f"it takes more than {TEMPLATE_SECONDS:.0f} s"),
            memory_limit(TEMPLATE_MEMORY),
        ):
            return str(
                tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                    **arguments,
                )
            )

    system = chat[0]["content"] if chat and chat[0]["role"] == "system" else None
    try:
        text = rendered(chat)
        if system is None or system.strip() in text:
            return text
    except jinja2.exceptions.TemplateError as error:
        if system is None:
            raise _refused(error) from error
    except Exception as error:  # a template is a program, and fails in its own ways
        raise _refused(error) from error
    try:
        text = rendered(without_system(chat))
    except Exception as error:  # as above
        raise _refused(error) from error
    report(MOVED)
    return text


def _refused(error: Exception) -> EvaluationError:
    reason = "it needs too much memory" if isinstance(error, MemoryError) else foreign(first_line(error), 200)
    if isinstance(error, LimitError):
        reason = str(error)
    return EvaluationError(f"The chat template refuses this benchmark's messages: {reason}")


def without_system(chat: Chat) -> Chat:
    """Return the chat with its system message as the beginning of the first user turn."""
    system, rest = chat[0], [dict(message) for message in chat[1:]]
    first = next((m for m in rest if m["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": system["content"]}, *rest]
    first["content"] = f"{system['content']}\n\n{first['content']}"
    return rest
