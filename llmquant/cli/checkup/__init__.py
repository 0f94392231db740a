"""What `llmquant doctor` looks at: this machine, and the engines that run elsewhere on it."""
