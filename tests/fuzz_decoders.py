"""A coverage-guided fuzzer of the protocol's decoders, with atheris (the extra `fuzz`).

    python tests/fuzz_decoders.py -runs=1000000
    python tests/fuzz_decoders.py -merge=1 tests/corpus/protocol .fuzz/found

Each input is the frames of a message, and goes through every decoder; what must come of it is in
tests/fuzzing.py. The first command begins from the samples and the corpus, and writes what reaches
new code to .fuzz/found; the second takes the smallest of it into the corpus, which the tests
replay. Options are those of libFuzzer. An input that breaks something is written to crash-*, or
timeout-* or oom-*.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

_GUIDING = ["hrpro.engine.messages", "hrpro.engine.protocol", "hrpro.engine.wire"]
with atheris.instrument_imports(include=_GUIDING):
    from fuzzing import DECODERS, decoded, joined, split
    from samples import SAMPLES

    from hrpro.engine import protocol

CORPUS = Path(__file__).parent / "corpus" / "protocol"
FOUND = Path(".fuzz") / "found"
SEEDS = Path(".fuzz") / "seeds"
# The longest header is 4096 bytes, but what is wrong about one shows in fewer.
DEFAULTS = ["-max_len=1024", "-timeout=2", "-rss_limit_mb=1024"]


def one_input(data: bytes) -> None:
    """Through every decoder."""
    frames = split(data)
    for name in DECODERS:
        decoded(name, frames)


def main() -> None:
    """Does not return: libFuzzer ends the process."""
    options = sys.argv[1:]
    if all(each.startswith("-") for each in options):
        for folder in (FOUND, SEEDS):
            folder.mkdir(parents=True, exist_ok=True)
        for name, message in SAMPLES.items():
            (SEEDS / name).write_bytes(joined(protocol.encode(message)))
        options += [str(FOUND), str(CORPUS), str(SEEDS)]
    # libFuzzer starts the first argument, as a command, to merge.
    atheris.Setup([f"{sys.executable} {__file__}", *DEFAULTS, *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
