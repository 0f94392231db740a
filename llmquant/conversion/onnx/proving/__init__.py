"""What an exported graph holds and computes, against the folder it was made of."""
