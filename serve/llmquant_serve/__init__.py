"""llmquant_serve: an OpenAI-compatible server and a chat for quantized models.

Layers, top down: ``cli`` → ``app`` (routes, limits, errors) → ``completions`` (text: templates,
stop strings, detokenization) → ``engine`` (token ids only), which is ``local`` (the packed model in
this process) or ``vllm`` (the real one as a child or a URL).
"""
