"""A gap in the middle of a class, filled with what stands behind it in view.

python examples/infill.py
"""

import trimode

SOURCE = """class Account:
    def __init__(self, name, balance):
        self.name = name
        <FILL>

    def get(self):
        return self.balance
"""


def main() -> None:
    lm = trimode.load("pocket")
    filled = lm.infill(SOURCE, language="python", lengths=[1, 2, 3, 4, 6, 8], seed=0)
    print(filled.text)
    for candidate in filled.gaps[0].candidates:
        parses = "parses" if candidate.is_valid else "broken"
        print(f"{candidate.log_prob:8.2f} nats, {parses}: {candidate.text!r}")


if __name__ == "__main__":
    main()
