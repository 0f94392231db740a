"""llmquant_serve: the serving side of llmquant. It holds nothing yet but its place in the distribution."""
