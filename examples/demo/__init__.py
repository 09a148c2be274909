"""The main job once, on real parts: a hundred models, one small device, one spike. `make demo`."""
