"""The machine that a run meets: its processor, and what follows from it: devices, compute dtype,
threads."""
