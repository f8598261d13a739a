"""The native step: a forward and a choice in C++, compiled where it runs. Nothing is compiled or
loaded at import."""
