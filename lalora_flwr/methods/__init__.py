"""The methods, one short file each, and the server that runs any of them.

A new method is one file with a `Method` value and one name in `METHODS`.
"""

from lalora_flwr.methods import dp_lora, ffa_lora, la_lora, rolora
from lalora_flwr.methods.method import Method

METHODS: dict[str, Method] = {m.METHOD.name: m.METHOD for m in (la_lora, dp_lora, ffa_lora, rolora)}

__all__ = ["METHODS", "Method"]
