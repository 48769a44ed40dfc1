"""Seeds of independent random streams, derived from the run's seed and what the stream is for."""

import hashlib


def derived_seed(*parts: int | str) -> int:
    """A 32-bit seed for the stream that `parts` name: (run's seed, purpose, position ...). 32 bits, as
    torch's CPU generator reads no more of a seed."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big")
