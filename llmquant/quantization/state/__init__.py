"""What survives a kill: journal, fingerprint, hidden states, log."""
