"""A typing error found and replaced: the AR view doubts, the diffusion view proposes.

python examples/revise.py
"""

import trimode

SOURCE = """import os
import sys


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__)
    args = parser.parse_args(argv)
    for name on args.names:
        print(name)
    return 0
"""


def main() -> None:
    lm = trimode.load("pocket")
    revision = lm.revise(SOURCE, lines=(6, 10), budget=1)
    for edit in revision.edits:
        print(f"line {edit.line}: {edit.old!r} -> {edit.new!r}, {edit.gain:.1f} nats likelier")
    print(revision.text)


if __name__ == "__main__":
    main()
