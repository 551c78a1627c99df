"""vLLM as another engine: how its processes are started, what is said to them, and the plug-ins that run inside them.

``launch``, ``wire`` and ``versions`` are policy, without torch and without vLLM; ``layout`` writes what vLLM loads. The
others are imported by vLLM's own processes, where heliostat is installed beside it, and by nobody else.
"""
