"""Binary assets of the embedded default, and the scripts that make them."""
