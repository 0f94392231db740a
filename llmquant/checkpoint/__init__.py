"""Folders of weights on disk: read, written, described and checked."""
