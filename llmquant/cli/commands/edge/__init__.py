"""Commands for engines on other devices."""
