"""Export to ONNX Runtime: the model builder of onnxruntime-genai writes the graph, and every packed
weight in it is read back and compared with the folder.

ONNX, ONNX Runtime and the builder live in an environment of their own (:mod:`.environment`) and are
never imported here. ``inside/`` has the scripts that its Python runs; they import nothing of
llmquant.

The builder reads GPTQ folders. So the packed numbers are written as one (:mod:`.source`), with
float32 scales and with zero-points that wrap: it takes each code back through a product with its
scale, which float16 would round, and it adds one to a zero-point modulo 2^bits. The proof
(:mod:`.proof`) does not trust that: codes, scales and zero-points of every node are compared with
the folder bit for bit.
"""
