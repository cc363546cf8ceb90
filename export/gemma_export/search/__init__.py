"""`gemma-export search`: exports, evaluates and measures many bundles, and shows the best ones."""
