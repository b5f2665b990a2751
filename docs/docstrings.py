"""What the site reads otherwise than a terminal does: sections, names, fields.

Docstrings have one example each, under ``Example:``, which griffe takes for prose; they
name what they refer to in backticks, which the site turns into links; and the arguments
of a Linen module are its fields, which griffe does not know.
"""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
_NAME = re.compile(r"(?<!`)`((?:normjax\.|Moments\b|RunningMoments\b)[\w.]*)`(?!`)")


def _link(match: re.Match[str]) -> str:
    name = match[1] if match[1].startswith("normjax.") else f"normjax.{match[1]}"
    return f"[`{match[1]}`][{name}]"


class Docstrings(griffe.Extension):
    """Renames the section of examples, links public names, and shows fields."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrites the docstring of an object, before it is parsed."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = _NAME.sub(_link, text)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Gives a Linen module the signature that its fields make."""
        if cls.module.path != "normjax.linen":
            return
        init = griffe.Function(
            "__init__",
            parameters=griffe.Parameters(
                griffe.Parameter("self", kind=griffe.ParameterKind.positional_only),
                *(
                    griffe.Parameter(
                        name,
                        annotation=field.annotation,
                        kind=griffe.ParameterKind.positional_or_keyword,
                        default=field.value,
                    )
                    for name, field in cls.attributes.items()
                    if field.annotation is not None
                ),
            ),
        )
        cls.set_member("__init__", init)
