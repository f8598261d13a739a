"""instructor, in the mode that asks for a schema and in the one that asks for a call."""

from __future__ import annotations

import instructor
import openai
from checks import ASK, TOOLS_URL, URL, Checks
from pydantic import BaseModel

checks = Checks("instructor")


class Sum(BaseModel):
    """A shape to answer in."""

    a: int
    is_odd: bool


for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    has_tools = mode is instructor.Mode.TOOLS
    url, model = (TOOLS_URL, "tools") if has_tools else (URL, "pocket")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    with checks(f"response_model, {mode}") as show:
        answer = instructor.from_openai(client, mode=mode).chat.completions.create(
            model=model,
            messages=ASK,
            response_model=Sum,
            max_retries=0,
            max_tokens=120,
            temperature=0,
        )
        assert isinstance(answer, Sum)
        show(answer)
