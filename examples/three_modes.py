"""One question, answered by the same checkpoint token by token and by self-speculation: the same
text, in fewer forwards."""

import signal
import sys

import torch

import trimode

signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word

question = sys.argv[1] if len(sys.argv) > 1 else "How do I make a cup of tea?"
messages = [{"role": "user", "content": question}]
lm = trimode.load()  # SmolLM2 with its drafter, where its weights are at hand
has_template = lm.tokenizer.chat_template  # the small model, for code, has none
prompt = lm.answering(messages, {})["prompt"] if has_template else "import os\n\n\ndef "
options = {"max_new_tokens": 96, "seed": 0}

size = f"{lm.model.num_parameters() / 1e6:.0f}M parameters, {str(lm.model.dtype).split('.')[1]}"
print(f"{size}, {torch.get_num_threads()} threads, at most 96 tokens, greedy\n")
print(f"{question if has_template else prompt}\n")
for piece in lm.stream(prompt, mode="ar", **options):
    print(piece, end="", flush=True)

modes = ("ar", "linear", "branching", "auto")
best = {}
for _ in range(4):  # in turn, so that a slow moment of the machine slows them all
    for mode in modes:
        found = lm.generate(prompt, mode=mode, **options)
        if mode not in best or found.stats.seconds < best[mode].stats.seconds:
            best[mode] = found

print(f"\n\n{'':11}{'tokens':>7}{'forwards':>10}{'a forward':>11}{'tokens/s':>10}{'over ar':>9}")
for mode in modes:
    text, stats = best[mode].text, best[mode].stats
    ratio = stats.tokens_per_second / best["ar"].stats.tokens_per_second
    same = "the same text" if text == best["ar"].text else "another text"
    print(f"{mode:11}{stats.new_tokens:>7}{stats.num_forwards:>10}{stats.tpf_total:>11.2f}", end="")
    print(f"{stats.tokens_per_second:>10.0f}{ratio:>8.2f}x  {same}")
