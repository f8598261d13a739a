"""A model writes its own training text: prompts, then answers to them, as conversations."""

from trimode.selfgen.options import SelfgenOptions
from trimode.selfgen.output import Output
from trimode.selfgen.writing import Writing

__all__ = ["Output", "SelfgenOptions", "Writing"]
