"""Text in: where it comes from, how it becomes token ids, and the calibration windows made of
it."""
