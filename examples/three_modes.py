"""One prompt, three ways: the same checkpoint decoded token by token, by diffusion, by
speculation."""

import signal
import sys

import trimode

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word

prompt = sys.argv[1] if len(sys.argv) > 1 else "import os\n\n\ndef "
lm = trimode.load()
lm.generate(prompt, mode="ar", max_new_tokens=8)  # warm up

texts = {}
knobs = {"ar": {}, "diffusion": {"threshold": 0.5}, "linear": {}}  # 0.9, the usual, is slow here
for mode, options in knobs.items():
    result = lm.generate(prompt, mode=mode, max_new_tokens=96, seed=0, **options)
    stats = result.stats
    forwards = ", ".join(f"{n} {kind}" for kind, n in stats.forwards.items() if n)
    print(f"\n=== {mode} ".ljust(80, "="))
    print(prompt + result.text)
    print(f"--- {stats.new_tokens} tokens in {stats.num_forwards} forwards ({forwards})")
    decode = "-" if stats.tpf_decode is None else f"{stats.tpf_decode:.2f}"
    print(f"--- tokens per forward: {decode} decode, {stats.tpf_total:.2f} total", end="; ")
    print(f"{stats.tokens_per_second:.0f} tokens/s")
    texts[mode] = result.text

how = "the same text as" if texts["linear"] == texts["ar"] else "another text (a near-tie) than"
print(f"\n`linear` wrote {how} `ar`; `diffusion` has a law of its own.")
