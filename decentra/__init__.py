"""decentra: people who share no cluster train one mixture-of-experts model together over ordinary internet links."""

__version__ = "0.1.0"
