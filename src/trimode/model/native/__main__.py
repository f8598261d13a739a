"""`python -m trimode.model.native`: build the library into the package, as `make` does."""

from __future__ import annotations

from trimode.model.native.library import build_beside_source

if __name__ == "__main__":
    build_beside_source()
