"""The zero-shot prompts and stop strings of the paper's maths evaluation (MergeLLM's, there from WizardMath and ToRA).

They are data: scores depend on each character. The reference also ran Python blocks that `wcot` outputs ended in; no
code is run here.
"""

from __future__ import annotations

from collections.abc import Mapping

_INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{input}\n\n### Response:"
)
TEMPLATES: Mapping[str, str] = {
    "wcot": _INSTRUCTION + " Let's think step by step.",
    "wiz": _INSTRUCTION,
    "wizard_zs": "### Instruction:\n{input}\n\n### Response: Let's think step by step.",
    "cot": "Question: {input}\nAnswer: ",
}
_ENDS = ("</s>", "<|im_end|>", "<|endoftext|>")
STOPS: Mapping[str, tuple[str, ...]] = {
    "wcot": (*_ENDS, "\n\nQuestion:"),
    "wiz": _ENDS,
    "wizard_zs": (*_ENDS, "Instruction", "Response"),
    "cot": (*_ENDS, "\n\nQuestion:"),
}


def prompt(prompt_type: str, problem: str) -> str:
    """Return the prompt of one problem, stripped at both ends as the reference does (so `cot` ends in a colon)."""
    return TEMPLATES[prompt_type].replace("{input}", problem).strip()


def question_of(doc: Mapping[str, str]) -> str:
    """The problem text of an item of GSM8K ("question") or MATH ("problem")."""
    return doc["question"] if "question" in doc else doc["problem"]


def wcot(doc: Mapping[str, str]) -> str:
    """The default prompt as a function of an item, for the task files."""
    return prompt("wcot", question_of(doc))
