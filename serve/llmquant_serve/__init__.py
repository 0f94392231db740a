"""llmquant_serve: an OpenAI-compatible server and a chat for quantized models.

Layers, top down: ``cli`` → ``server`` and ``build`` → ``chat`` (terminal and page) → ``api``
(routes, limits, errors) → ``service`` → ``generation`` (text: templates, stop strings,
detokenization) → ``engines`` (token ids only): ``local``, the packed model in this process, or
``vllm``, as a child process or at a URL.
"""
