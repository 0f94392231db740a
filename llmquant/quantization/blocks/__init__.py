"""One decoder block at work: what goes in, what its linears read, what comes out."""
