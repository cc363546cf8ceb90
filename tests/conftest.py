"""How long an example takes says how busy the machine is: none has a deadline."""

from hypothesis import settings

from gemma_runtime.privacy import opt_out

opt_out()  # also for tests that import onnxruntime or transformers first
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
