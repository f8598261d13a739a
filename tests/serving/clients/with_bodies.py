"""What programs that are not run here send, written down from their sources."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
from checks import URL, Checks

for sent in json.loads((Path(__file__).parent / "bodies.json").read_text("utf-8")):
    with Checks("httpx")(f"the body of: {sent['client']}") as show:
        body = {**sent["body"], **({"model": "pocket"} if "model" in sent["body"] else {})}
        answer = httpx.post(
            f"{URL}/{sent['path']}", json=body, headers=sent["headers"], timeout=120
        )
        assert answer.is_success, answer.text
        assert not body["stream"] or answer.text.endswith("data: [DONE]\n\n")
        show(answer.text)
