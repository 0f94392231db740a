"""How fast models run and what memory they take, beside each other: ``llmquant bench``."""
