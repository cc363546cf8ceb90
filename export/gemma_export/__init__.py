"""Turns Gemma checkpoints into bundles that phones, laptops and boards can run."""

from gemma_runtime.privacy import opt_out

opt_out()  # before any library that collects usage statistics is imported
