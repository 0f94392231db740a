"""Models that can be scored: folders, hub names, running servers."""
