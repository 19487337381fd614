"""Templates: published families' formats for tasks, as one sequence of ids. Data only, no model.

A template has ids (a small dataclass that the family fills in) and a `tokenize` function. Its methods return a
`Layout`, or for guidance a `Guided`. Three styles cover the published families: `chat` (LLaDA), `task_token`
(MMaDA, MMaDA-Parallel-M), `answer_tag` (Lumina-DiMOO, MMaDA-Parallel-A).
"""

from unidiff.templates.answer_tag import AnswerTagTemplates
from unidiff.templates.chat import ChatTemplates
from unidiff.templates.layout import Guided, Layout, Part, Picture, PromptTemplate, Role, Text
from unidiff.templates.task_token import TaskTokenTemplates

__all__ = [
    "AnswerTagTemplates",
    "ChatTemplates",
    "Guided",
    "Layout",
    "Part",
    "Picture",
    "PromptTemplate",
    "Role",
    "TaskTokenTemplates",
    "Text",
]
