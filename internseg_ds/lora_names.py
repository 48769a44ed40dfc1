"""The names of parameters in layers that peft has given a low-rank adapter: those of files are the names without
adapters. Apart from `models/lora.py`, so that who reads files loads no models."""

import re

BASE = ".base_layer."
"""Between the name of an adapted layer and those of its own parameters, as peft names them."""
FACTOR = re.compile(r"\.lora_([AB])\.default\.weight$")
"""The end of the names of A and B."""


def is_factor(name: str) -> bool:
    """Whether a parameter, by its name, is A or B of an adapter."""
    return FACTOR.search(name) is not None


def plain_name(name: str) -> str:
    """The name that a parameter of an adapted layer has in the model without adapters. A and B have that of
    the weight which they change."""
    return FACTOR.sub(".weight", name).replace(BASE, ".")


def factor_names(name: str) -> tuple[str, str]:
    """The names of A and B of the layer whose weight has the plain name `name`."""
    layer = name.removesuffix(".weight")
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"
