"""Texts as token ids, the same for every model that reads them."""
