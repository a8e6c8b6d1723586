"""Engines that complete chats, and the pool that serves them to a whole job."""

ENGINES = {
    "vllm": "itune_ray.engine.vllm:VllmEngine",
    "http": "itune_ray.engine.http:HttpEngine",
    "fake": "itune_ray.engine.fake:FakeEngine",
}
"""Engine type -> class; each takes (config, model, threads)."""
