"""A gap in the middle of a function, filled with what stands behind it in view.

python examples/infill.py
"""

import trimode

SOURCE = """class Stack:
    def __init__(self):
        <FILL>

    def push(self, item):
        self.items.append(item)
"""


def main() -> None:
    lm = trimode.load()
    filled = lm.infill(SOURCE, language="python", lengths=[2, 4, 6, 8, 10], seed=0)
    print(filled.text)
    for candidate in filled.gaps[0].candidates:
        parses = "parses" if candidate.is_valid else "broken"
        print(f"{candidate.log_prob:8.2f} nats, {parses}: {candidate.text!r}")


if __name__ == "__main__":
    main()
