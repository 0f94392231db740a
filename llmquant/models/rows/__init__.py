"""The table of architectures: what a row holds, and the rows."""
