"""Engines that work in a thread of this process: requests as jobs, their queue, its thread, and the
asyncio side. ``local`` and ``onnx`` are such engines."""
