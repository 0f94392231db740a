"""The original as a teacher: what it says of each token, kept on disk, and the loss against it."""
