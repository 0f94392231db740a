"""Drift: requests are observed as they end, and compared with a profile."""
